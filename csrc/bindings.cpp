// Python module cacr_kernels._native. Knows nothing of torch: pointers, strides and sizes come in as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/reserve.h"
#include "include/problem.h"
#if defined(CACR_WITH_CUDA)
#include "include/cuda_api.h"
#endif

namespace py = pybind11;
using namespace cacr;

namespace {

// (address, four strides in elements); address 0 is null.
using TensorArgument = std::pair<std::uintptr_t, std::array<i64, 4>>;

template <typename Tensor>
Tensor tensor_of(const TensorArgument& argument) {
    Tensor t{};
    t.data = reinterpret_cast<void*>(argument.first);
    for (int i = 0; i < 4; ++i) t.stride[i] = argument.second[(size_t)i];
    return t;
}

template <typename Tensor>
void set_four(Tensor (&target)[4], const std::vector<TensorArgument>& arguments) {
    if (arguments.size() != 4) throw std::invalid_argument("expected the four blocks tt, tv, vt, vv");
    for (size_t i = 0; i < 4; ++i) target[i] = tensor_of<Tensor>(arguments[i]);
}

Options options_of(int kind, int sides, int stop_gradient, double projection_scale, bool projection_mean, bool row_mean) {
    return {(Kind)kind, (Sides)sides, (StopGradient)stop_gradient, projection_scale, projection_mean, row_mean};
}

SpanTable spans_of(std::uintptr_t table, int text_start, int vision_start, int n_text, int n_vision, int limit_text,
                   int limit_vision, bool disjoint) {
    return {reinterpret_cast<const int*>(table), text_start, vision_start, n_text, n_vision, limit_text, limit_vision, disjoint};
}

// A gradient's memory: Python sees a buffer of bytes and gives it back by forgetting it.
struct Memory {
    explicit Memory(std::size_t wanted) : bytes(wanted) { data = reserve_take(wanted, capacity); }
    ~Memory() { reserve_release(data, capacity); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    std::size_t bytes;
    std::size_t capacity = 0;
    void* data = nullptr;
};

#if defined(CACR_WITH_CUDA)
void check_cuda(int code, const char* what) {
    if (code) throw std::runtime_error(std::string("CUDA ") + what + " kernel: " + cacr_error_cuda(code));
}
#endif

py::dict build_info() {
    py::dict info;
    info["compiler"] = CACR_COMPILER;
    info["openmp"] = cpu_has_openmp();
    info["instruction_sets"] = cpu_instruction_sets();
    info["instruction_set"] = cpu_kernels("").name;
#if defined(CACR_WITH_CUDA)
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    info["cuda_compiler"] = CACR_CUDA_COMPILER;
    info["cuda_architectures"] = CACR_CUDA_ARCHITECTURES;
    info["cuda_reason"] = CACR_CUDA_REASON;
    return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native CACR kernels (C++, CUDA C++); cacr_kernels.native is their Python face.";
    m.attr("interface") = 1;  // native.py has the same number, and refuses another: raise both with every change here
    m.def("build_info", &build_info);

    py::class_<Options>(m, "Options")
        .def(py::init(&options_of), py::arg("kind"), py::arg("sides"), py::arg("stop_gradient"), py::arg("projection_scale"),
             py::arg("projection_mean"), py::arg("row_mean"));
    py::class_<SpanTable>(m, "SpanTable")
        .def(py::init(&spans_of), py::arg("table"), py::arg("text_start"), py::arg("vision_start"), py::arg("n_text"),
             py::arg("n_vision"), py::arg("limit_text"), py::arg("limit_vision"), py::arg("disjoint"));

    py::class_<Problem>(m, "Problem")
        .def(py::init([](int dtype, const Options& options, const SpanTable& spans, i64 batch, i64 heads, bool single,
                         const std::vector<TensorArgument>& blocks) {
                 Problem p{};
                 p.dtype = (DType)dtype;
                 p.options = options;
                 p.spans = spans;
                 p.batch = batch;
                 p.heads = heads;
                 p.single = single;
                 p.device = -1;
                 p.threads = 1;
                 set_four(p.blocks, blocks);
                 return p;
             }),
             py::arg("dtype"), py::arg("options"), py::arg("spans"), py::arg("batch"), py::arg("heads"), py::arg("single"),
             py::arg("blocks"))
        .def("set_grads",
             [](Problem& p, const std::vector<TensorArgument>& grads) {
                 set_four(p.grads, grads);
                 p.has_grads = 1;
             })
        .def("set_loss", [](Problem& p, std::uintptr_t loss) { p.loss = reinterpret_cast<void*>(loss); })
        .def("set_grad_loss",
             [](Problem& p, std::uintptr_t data, std::array<i64, 2> stride) {
                 p.grad_loss = reinterpret_cast<const void*>(data);
                 p.grad_loss_stride[0] = stride[0];
                 p.grad_loss_stride[1] = stride[1];
             })
        .def("set_stats", [](Problem& p, std::uintptr_t stats) { p.stats = reinterpret_cast<float*>(stats); })
        .def("set_workspace",
             [](Problem& p, std::uintptr_t data, i64 bytes) {
                 p.workspace = reinterpret_cast<void*>(data);
                 p.workspace_bytes = bytes;
             })
        .def("set_stream",
             [](Problem& p, std::uintptr_t stream, int device) {
                 p.stream = reinterpret_cast<void*>(stream);
                 p.device = device;
             })
        .def("set_threads", [](Problem& p, int threads) { p.threads = threads; });

    py::class_<QkProblem>(m, "QkProblem")
        .def(py::init([](int dtype, const Options& options, const SpanTable& spans, i64 batch, i64 heads, i64 key_heads, int n,
                         int dim, double scale, const TensorArgument& q, const TensorArgument& k) {
                 QkProblem p{};
                 p.dtype = (DType)dtype;
                 p.options = options;
                 p.spans = spans;
                 p.batch = batch;
                 p.heads = heads;
                 p.key_heads = key_heads;
                 p.n = n;
                 p.dim = dim;
                 p.scale = scale;
                 p.q = tensor_of<ConstTensor>(q);
                 p.k = tensor_of<ConstTensor>(k);
                 p.threads = 1;
                 return p;
             }),
             py::arg("dtype"), py::arg("options"), py::arg("spans"), py::arg("batch"), py::arg("heads"), py::arg("key_heads"),
             py::arg("n"), py::arg("dim"), py::arg("scale"), py::arg("q"), py::arg("k"))
        .def("set_grads",
             [](QkProblem& p, const TensorArgument& grad_q, const TensorArgument& grad_k) {
                 p.grad_q = tensor_of<MutableTensor>(grad_q);
                 p.grad_k = tensor_of<MutableTensor>(grad_k);
                 p.has_grads = 1;
             })
        .def("set_loss", [](QkProblem& p, std::uintptr_t loss) { p.loss = reinterpret_cast<void*>(loss); })
        .def("set_grad_loss",
             [](QkProblem& p, std::uintptr_t data, std::array<i64, 2> stride) {
                 p.grad_loss = reinterpret_cast<const void*>(data);
                 p.grad_loss_stride[0] = stride[0];
                 p.grad_loss_stride[1] = stride[1];
             })
        .def("set_threads", [](QkProblem& p, int threads) { p.threads = threads; });

    py::class_<Memory>(m, "Memory", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("bytes"))
        .def_buffer([](Memory& memory) {
            return py::buffer_info(static_cast<unsigned char*>(memory.data), (py::ssize_t)memory.bytes);
        });
    m.def("memory_limit", &reserve_limit, py::arg("bytes"), "Bytes of freed Memory to keep for later.");
    m.def("memory_kept", &reserve_kept, "Bytes of freed Memory kept at the moment.");

    m.def(
        "qk_cpu",
        [](const QkProblem& p, const std::string& instruction_set) {
            const Kernels& kernels = cpu_kernels(instruction_set);
            py::gil_scoped_release release;
            cacr_qk_cpu(p, kernels);
        },
        py::arg("problem"), py::arg("instruction_set") = "");
    m.def(
        "scores_cpu",
        [](const Problem& p, const std::string& instruction_set) {
            const Kernels& kernels = cpu_kernels(instruction_set);
            py::gil_scoped_release release;
            cacr_scores_cpu(p, kernels);
        },
        py::arg("problem"), py::arg("instruction_set") = "");
    m.def(
        "scale_cpu",
        [](int dtype, i64 batch, i64 heads, i64 elements, std::uintptr_t source, std::uintptr_t target, std::uintptr_t grad_loss,
           std::array<i64, 2> stride, double expected_grad, int threads) {
            const Scaling s = {(DType)dtype, batch, heads, elements, reinterpret_cast<const void*>(source),
                               reinterpret_cast<void*>(target), reinterpret_cast<const void*>(grad_loss),
                               {stride[0], stride[1]}, expected_grad, threads};
            py::gil_scoped_release release;
            return cacr_scale_cpu(s);
        },
        py::arg("dtype"), py::arg("batch"), py::arg("heads"), py::arg("elements"), py::arg("source"), py::arg("target"),
        py::arg("grad_loss"), py::arg("grad_loss_stride"), py::arg("expected_grad"), py::arg("threads"));
    m.def(
        "cpu_rates",
        [](int threads, double seconds, const std::string& instruction_set) {
            const Kernels& kernels = cpu_kernels(instruction_set);
            py::gil_scoped_release release;
            return std::make_pair(cpu_rate(kernels.multiply_adds, threads, seconds / 2),
                                  cpu_rate(kernels.exponentials, threads, seconds / 2));
        },
        py::arg("threads"), py::arg("seconds") = 0.2, py::arg("instruction_set") = "",
        "float32 multiply-adds and exponentials per second from L1: the arithmetic roofs of the CPU kernels.");

#if defined(CACR_WITH_CUDA)
    m.def("forward_workspace_cuda", &cacr_forward_workspace_cuda, py::arg("problem"), py::call_guard<py::gil_scoped_release>(),
          "Bytes of workspace per (b, h).");
    m.def("backward_workspace_cuda", &cacr_backward_workspace_cuda, py::arg("problem"), py::call_guard<py::gil_scoped_release>(),
          "Bytes of workspace per (b, h).");
    m.def("scores_forward_cuda", [](const Problem& p) { check_cuda(cacr_forward_cuda(p), "forward"); }, py::arg("problem"),
          py::call_guard<py::gil_scoped_release>());
    m.def("scores_backward_cuda", [](const Problem& p) { check_cuda(cacr_backward_cuda(p), "backward"); }, py::arg("problem"),
          py::call_guard<py::gil_scoped_release>());
    m.def(
        "cuda_devices",
        [] {
            const char* reason = "";
            const int count = cacr_device_count_cuda(&reason);
            return std::make_pair(count, std::string(count ? "" : reason));
        },
        "(number of usable devices, why there is none).");
#endif
}
