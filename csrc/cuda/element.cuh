// Storage types of attention scores, and their conversion to the float32 in which everything is computed.
#pragma once

#include "primitives.cuh"

namespace cacr {

struct Half {
    unsigned short bits;
};

struct Bfloat16 {
    unsigned short bits;
};

CACR_DEVICE float to_float(float value) { return value; }
CACR_DEVICE float to_float(Half value) { return float_of_half(value.bits); }
CACR_DEVICE float to_float(Bfloat16 value) { return float_of((unsigned)value.bits << 16); }

// Round to nearest even; every NaN becomes a quiet NaN.
CACR_DEVICE Bfloat16 bfloat16_of(float value) {
    const unsigned bits = bits_of(value);
    return {value != value ? (unsigned short)0x7fff : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

CACR_DEVICE void from_float(float value, float& out) { out = value; }
CACR_DEVICE void from_float(float value, Half& out) { out.bits = half_of_float(value); }
CACR_DEVICE void from_float(float value, Bfloat16& out) { out = bfloat16_of(value); }

// Element `offset` of a tensor of the problem's dtype, where the type is not worth a template.
CACR_DEVICE float load(DType dtype, const void* data, i64 offset) {
    if (dtype == DType::f32) return ((const float*)data)[offset];
    if (dtype == DType::f16) return to_float(((const Half*)data)[offset]);
    return to_float(((const Bfloat16*)data)[offset]);
}

CACR_DEVICE i64 size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The score at an address. F: type of the factors of the products, which is that of the scores unless the kind is softmax;
// then it is float.
template <typename F>
CACR_DEVICE float load_score(DType dtype, const char* from) {
    return sizeof(F) == sizeof(float) ? load(dtype, from, 0) : to_float(*(const F*)from);
}

CACR_DEVICE void store(DType dtype, void* data, i64 offset, float value) {
    if (dtype == DType::f32)
        from_float(value, ((float*)data)[offset]);
    else if (dtype == DType::f16)
        from_float(value, ((Half*)data)[offset]);
    else
        from_float(value, ((Bfloat16*)data)[offset]);
}

}  // namespace cacr
