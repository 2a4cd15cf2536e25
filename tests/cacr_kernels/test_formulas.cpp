// csrc/include/formulas.h and problem.h against long double. Exit code 0 if every check holds, else the failures are printed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "formulas.h"

using namespace cacr;
typedef long double Wide;

static int failures = 0;

static void check(bool ok, const char* what, double got, double want) {
    if (ok) return;
    ++failures;
    std::printf("%s: got %.17g, expected %.17g\n", what, got, want);
}

static void close(const char* what, double got, Wide want, double relative, double absolute) {
    check(std::fabs((Wide)got - want) <= relative * std::fabs(want) + absolute, what, got, (double)want);
}

struct WideRow {
    std::vector<Wide> dx, dy;
    Wide loss;
};

// KL(p||q) + KL(q||p) from its definition, and its derivatives by the quotient rule.
template <typename T>
static WideRow wide_row(Wide factor, const std::vector<T>& product, const std::vector<T>& y) {
    std::vector<Wide> x;
    for (const T value : product) x.push_back(factor * value);
    const size_t n = x.size();
    Wide top_x = -INFINITY, top_y = -INFINITY, sum_x = 0, sum_y = 0;
    for (size_t j = 0; j < n; ++j) {
        top_x = std::fmax(top_x, x[j]);
        top_y = std::fmax(top_y, (Wide)y[j]);
    }
    for (size_t j = 0; j < n; ++j) {
        sum_x += std::exp(x[j] - top_x);
        sum_y += std::exp((Wide)y[j] - top_y);
    }
    WideRow row;
    row.loss = 0;
    Wide mean_p = 0, mean_q = 0;
    std::vector<Wide> p(n), q(n), r(n);
    for (size_t j = 0; j < n; ++j) {
        const Wide log_p = x[j] - top_x - std::log(sum_x), log_q = y[j] - top_y - std::log(sum_y);
        p[j] = std::exp(log_p);
        q[j] = std::exp(log_q);
        r[j] = log_p - log_q;
        row.loss += p[j] * r[j] - q[j] * r[j];
        mean_p += p[j] * r[j];
        mean_q += q[j] * r[j];
    }
    for (size_t j = 0; j < n; ++j) {
        row.dx.push_back(p[j] * (r[j] - mean_p) + p[j] - q[j]);
        row.dy.push_back(q[j] * (mean_q - r[j]) - p[j] + q[j]);
    }
    return row;
}

// The row of logits factor * x and y in tiles of `tile` elements, as a kernel walks it.
template <typename T>
static RowState<T> walk(T factor, const std::vector<T>& x, const std::vector<T>& y, size_t begin, size_t end, size_t tile, T low_x,
                        T low_y) {
    RowState<T> s = row_begin<T>(low_x, low_y);
    for (size_t j = begin; j < end; j += tile) {
        const size_t stop = j + tile < end ? j + tile : end;
        T top_x = ordered(factor, x[j]), top_y = y[j];
        for (size_t k = j; k < stop; ++k) {
            top_x = std::fmax(top_x, ordered(factor, x[k]));
            top_y = std::fmax(top_y, y[k]);
        }
        row_raise(s, factor, top_x, top_y);
        for (size_t k = j; k < stop; ++k) row_add(s, factor, x[k], y[k]);
        if (j == begin) {
            row_restart(s);
            for (size_t k = j; k < stop; ++k) row_add(s, factor, x[k], y[k]);
        }
        row_follow(s);
    }
    return s;
}

template <typename T>
static void check_state(const char* what, const RowState<T>& s, const std::vector<T>& x, const std::vector<T>& y, const WideRow& want,
                        double eps) {
    const double n = (double)x.size();
    const RowNumbers<T> numbers = row_finish(s);
    Wide spread = 1;
    for (size_t j = 0; j < x.size(); ++j)
        spread = std::fmax(spread, std::fabs(((Wide)x[j] - numbers.max_x) - ((Wide)y[j] - numbers.max_y)));
    const double unit = eps * (8 + 2 * std::sqrt(n)) * (double)spread;
    close(what, row_loss(s), want.loss, unit, 2 * unit);
    close(what, numbers.mean_p - numbers.mean_q, want.loss, unit, 2 * unit);
    for (size_t j = 0; j < x.size(); ++j) {
        const RowGrad<T> g = row_grad(row_scales(numbers), (T)1, x[j], y[j]);
        close(what, g.dx, want.dx[j], unit, 2 * unit);
        close(what, g.dy, want.dy[j], unit, 2 * unit);
    }
}

// Errors of the mean loss and of dL/dx of 64 rows, root mean square over problems; a row in two halves that are merged. Nearly
// uniform, the loss is several times less exact where c or the dots stay behind, or are not restarted with the first tile, and
// in ascending rows where the sums of exponentials round the same way at every step. Nearly one-hot, dL/dx is where c goes with
// a maximum that leaves the elements so far without weight, and where the two passes round x - m_x differently.
template <typename T>
static void check_hard_rows(const char* what, T factor, double deviation_x, double deviation_y, bool ascending, double loss_bound,
                            double gradient_bound, std::mt19937& generator) {
    std::normal_distribution<double> normal;
    const int problems = 16;
    Wide loss_squares = 0, gradient_squares = 0;
    for (int problem = 0; problem < problems; ++problem) {
        Wide want_loss = 0, loss = 0, wrong = 0, size = 0;
        for (int row = 0; row < 64; ++row) {
            std::vector<T> x, y;
            for (size_t j = 0; j < 100; ++j) {
                x.push_back((T)(deviation_x * normal(generator)));
                y.push_back((T)(deviation_y * normal(generator)));
            }
            if (ascending) std::sort(y.begin(), y.end());
            const WideRow want = wide_row(factor, x, y);
            const T low_x = std::fmin(ordered(factor, x[0]), ordered(factor, x[50])), low_y = std::fmin(y[0], y[50]);
            RowState<T> s = walk<T>(factor, x, y, 0, 50, 16, low_x, low_y);
            row_merge(s, factor, walk<T>(factor, x, y, 50, 100, 16, low_x, low_y));
            want_loss += want.loss;
            loss += row_loss(s);
            const RowScales<T> scales = row_scales(row_finish(s));
            for (size_t j = 0; j < 100; ++j) {
                const RowGrad<T> g = row_grad(scales, factor, x[j], y[j]);
                wrong += (g.dx - want.dx[j]) * (g.dx - want.dx[j]);
                size += want.dx[j] * want.dx[j];
            }
        }
        loss_squares += (loss - want_loss) / want_loss * ((loss - want_loss) / want_loss) / problems;
        gradient_squares += wrong / size / problems;
    }
    check(std::sqrt(loss_squares) < loss_bound, what, (double)std::sqrt(loss_squares), loss_bound);
    check(std::sqrt(gradient_squares) < gradient_bound, what, (double)std::sqrt(gradient_squares), gradient_bound);
}

template <typename T>
static void check_rows(double eps) {
    std::mt19937 generator(7);
    std::normal_distribution<double> normal;
    for (size_t n : {1u, 2u, 7u, 33u, 129u})
        for (double offset : {0.0, 300.0, -300.0})
            for (double deviation : {1e-3, 1.0, 30.0})
                for (size_t tile : {1u, 4u, 64u}) {
                    std::vector<T> x, y;
                    for (size_t j = 0; j < n; ++j) {
                        x.push_back((T)(normal(generator) * deviation + offset));
                        y.push_back((T)(normal(generator) * deviation + offset));
                    }
                    const WideRow want = wide_row(1, x, y);
                    T ref_x = x[0], ref_y = y[0];
                    for (size_t j = 0; j < n && j < tile; ++j) {
                        ref_x = std::fmax(ref_x, x[j]);
                        ref_y = std::fmax(ref_y, y[j]);
                    }
                    check_state<T>("row in tiles", walk<T>(1, x, y, 0, n, tile, ref_x, ref_y), x, y, want, eps);
                    if (n < 2) continue;
                    const T low_x = std::fmin(x[0], x[n / 2]), low_y = std::fmin(y[0], y[n / 2]);
                    RowState<T> s = walk<T>(1, x, y, 0, n / 2, tile, low_x, low_y);
                    row_merge<T>(s, 1, walk<T>(1, x, y, n / 2, n, tile, low_x, low_y));
                    check_state<T>("merged halves", s, x, y, want, eps);
                }
    check_hard_rows<T>("nearly uniform rows", 1, 1e-6, 1e-3, false, 60 * eps, 1500 * eps, generator);
    check_hard_rows<T>("nearly uniform ascending rows", 1, 1e-6, 1e-3, true, 200 * eps, 1500 * eps, generator);
    check_hard_rows<T>("nearly one-hot rows", 1, 1e5, 10, false, 4 * eps, 50 * eps, generator);
    check_hard_rows<T>("nearly one-hot scaled rows", (T)0.3, 3e5, 10, false, 4 * eps, 50 * eps, generator);
    check_hard_rows<T>("nearly one-hot negated rows", (T)-0.3, 3e5, 10, false, 4 * eps, 50 * eps, generator);
    check_hard_rows<T>("one-hot scaled rows of 1e15", (T)0.3, 3e15, 10, false, 4 * eps, 50 * eps, generator);
    // Equal distributions: exactly zero, and so are both derivatives.
    const std::vector<T> same = {(T)-3, (T)1.25, (T)0.5, (T)-40};
    const RowState<T> s = walk<T>(1, same, same, 0, 4, 2, (T)-3, (T)-3);
    check(row_loss(s) == 0, "equal rows", (double)row_loss(s), 0);
    const RowGrad<T> g = row_grad(row_scales(row_finish(s)), (T)1, same[1], same[1]);
    check(g.dx == 0 && g.dy == 0, "equal rows, gradient", (double)g.dx, 0);
}

template <typename T>
static void check_scalars(double eps) {
    close("logit of 0.3", logit_of_prob((T)0.3), std::log((Wide)(T)0.3), 4 * eps, 0);
    close("logit of 0", logit_of_prob((T)0), std::log((Wide)(T)1e-12), 4 * eps, 0);
    check(std::isnan(logit_of_prob((T)NAN)), "logit of NaN", (double)logit_of_prob((T)NAN), NAN);
    close("logit gradient", logit_of_prob_grad((T)0.3), 1 / (Wide)(T)0.3, 4 * eps, 0);
    check(logit_of_prob_grad((T)1e-13) == 0, "clamped logit gradient", (double)logit_of_prob_grad((T)1e-13), 0);
    close("softmax", softmax_of((T)1, (T)2, (T)3), std::exp((Wide)-1) / 3, 4 * eps, 0);
    close("softmax gradient", softmax_grad((T)0.5, (T)3, (T)1), 1, 4 * eps, 0);
}

static void expect_valid(bool valid, SpanTable spans, int ts, int nt, int vs, int nv) {
    const int row[4] = {ts, nt, vs, nv};
    spans.table = row;
    const Extent e = extent_of(spans, 0);
    check((bool)e.valid == valid, "extent", e.valid, valid);
}

static void check_extents() {
    const SpanTable joint = {nullptr, 1, 5, 4, 6, 12, 12, 1};
    const Extent fixed = extent_of(joint, 3);
    check(fixed.valid && fixed.text_start == 1 && fixed.n_vision == 6, "fixed spans", fixed.text_start, 1);
    expect_valid(true, joint, 0, 4, 4, 6);
    expect_valid(true, joint, 8, 4, 2, 6);
    expect_valid(true, joint, 12, 0, 0, 6);
    expect_valid(true, joint, 3, 0, 0, 6);
    expect_valid(false, joint, 0, 5, 5, 6);
    expect_valid(false, joint, 0, 4, 4, 7);
    expect_valid(false, joint, -1, 4, 4, 6);
    expect_valid(false, joint, 0, -1, 4, 6);
    expect_valid(false, joint, 0, 4, 7, 6);
    expect_valid(false, joint, 0, 4, 3, 6);
    expect_valid(false, joint, 5, 3, 0, 6);
    expect_valid(false, joint, 2147483647, 4, 0, 6);
    const SpanTable blocks = {nullptr, 0, 0, 4, 6, 4, 6, 0};
    expect_valid(true, blocks, 0, 4, 0, 6);
    expect_valid(false, blocks, 1, 4, 0, 6);
}

static void check_factors() {
    Options o = {Kind::scores, Sides::both, StopGradient::none, 0.5, 0, 0};
    check(projection_factor(o, 10) == 0.5 && row_factor(o, 4) == 1, "plain factors", projection_factor(o, 10), 0.5);
    o.projection_mean = o.row_mean = 1;
    check(projection_factor(o, 10) == 0.005 && row_factor(o, 4) == 0.25, "mean factors", projection_factor(o, 10), 0.005);
    const Extent full = {0, 2, 2, 3, 1}, empty = {0, 0, 0, 3, 1};
    check(side_active(o, full, 0) && side_active(o, full, 1) && !side_active(o, empty, 1), "sides", 0, 1);
    o.sides = Sides::vision;
    check(!side_active(o, full, 0) && side_active(o, full, 1), "vision only", 0, 1);
}

int main() {
    check_rows<float>(6e-8);
    check_rows<double>(1.2e-16);
    check_scalars<float>(6e-8);
    check_scalars<double>(1.2e-16);
    check_extents();
    check_factors();
    if (failures) std::printf("%d failures\n", failures);
    return failures != 0;
}
