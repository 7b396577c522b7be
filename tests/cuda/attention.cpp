// The attention kernels for tensor cores against the definition in f64: outputs, logs of sums and all gradients, over masks, shapes and layouts.
// Built once per WIDTH, VALUE_WIDTH, ELEMENT and SIXTEENS (check.sh).

#include "emulate.h"

#include "tiles.cuh"
namespace forward {
#include "attend.cu"
}
namespace queries_back {
#include "back_to_queries.cu"
}
namespace keys_back {
#include "back_to_keys.cu"
}

#include <random>
#include <string>

// Largest difference, relative to the largest number: that of rounding weights and results to operands.
constexpr double ALLOWED = ELEMENT[0] == 'b' ? 1e-2 : 1.2e-3;
constexpr double ALLOWED_LOG = 2e-5;
// What lies between the rows of a tensor: NaN in both types.
constexpr u16 GAP = 0x7fff;

static int problems = 0;

// `[batch, heads, seq, width]` of operands with gaps between rows, heads and rows of the batch.
struct Tensor {
    int batch, heads, seq, width;
    Strides strides;
    std::vector<u16> numbers;

    // `by_position` lays the heads of a position side by side, as projections do.
    Tensor(int batch, int heads, int seq, int width, bool by_position)
        : batch(batch), heads(heads), seq(seq), width(width) {
        const i64 row = width + 8;
        if (by_position) strides = {(heads * row + 8) * seq + 16, row, heads * row + 8};
        else strides = {(seq * row + 8) * heads + 16, seq * row + 8, row};
        numbers.assign(batch * strides.batch + 8, GAP);
    }

    size_t at(int b, int h, int i, int c) const { return b * strides.batch + h * strides.head + i * strides.row + c; }
    double operator()(int b, int h, int i, int c) const { return emulated::wide(numbers[at(b, h, i, c)]); }

    template <typename F>
    void each(F f) const {
        for (int b = 0; b < batch; b++)
            for (int h = 0; h < heads; h++)
                for (int i = 0; i < seq; i++)
                    for (int c = 0; c < width; c++) f(b, h, i, c);
    }

    void fill(std::mt19937 &random) {
        std::normal_distribution<float> normal;
        each([&](int b, int h, int i, int c) { numbers[at(b, h, i, c)] = emulated::narrow(normal(random)); });
    }

    // Whether nothing but its numbers was written.
    bool gaps_untouched() const {
        std::vector<bool> own(numbers.size());
        each([&](int b, int h, int i, int c) { own[at(b, h, i, c)] = true; });
        for (size_t i = 0; i < numbers.size(); i++)
            if (!own[i] && numbers[i] != GAP) return false;
        return true;
    }
};

struct Options {
    // Whether rows of the batch have masks of their own.
    bool rows_differ = false;
    bool sinks = false;
    // How q lies in memory, and others the other way.
    bool by_position = true;
    // Whether warps run from last to first.
    bool backwards = false;
};

struct Case {
    std::string name;
    int batch, queries, keys;
    std::vector<int> key_heads, value_heads;
    // The keys that a query of a row of the batch sees, as first and end.
    std::function<std::pair<int, int>(int, int)> seen;
    Options how = {};
};

// As attention/gpu.rs makes it.
static std::vector<int> plan_of(const Case &call) {
    std::vector<int> plan;
    for (size_t h = 0; h < call.key_heads.size(); h++) plan.insert(plan.end(), {call.key_heads[h], call.value_heads[h]});
    for (int b = 0; b < (call.how.rows_differ ? call.batch : 1); b++) {
        std::vector<int> spans, ranges;
        for (int query = 0; query < call.queries; query++) {
            auto [from, to] = call.seen(b, query);
            if (from >= to) from = to = 0;
            ranges.insert(ranges.end(), {from, to});
            if (query % 64 == 0) spans.insert(spans.end(), {0, 0});
            int &first = spans[spans.size() - 2], &end = spans.back();
            if (from < to) first = first < end ? min(first, from) : from, end = max(end, to);
        }
        plan.insert(plan.end(), spans.begin(), spans.end());
        plan.insert(plan.end(), ranges.begin(), ranges.end());
    }
    return plan;
}

// Tells how far `got` is from `want`, which counts from `origin` on.
template <typename G, typename W>
static void compare(const char *what, size_t count, G got, W want, double allowed, bool relative) {
    double largest = 0, worst = 0;
    bool finite = true;
    for (size_t i = 0; i < count; i++) {
        largest = std::max(largest, std::fabs(want(i)));
        finite = finite && std::isfinite(got(i));
        worst = std::max(worst, std::fabs(got(i) - want(i)));
    }
    const double difference = relative ? worst / std::max(largest, 1e-2) : worst;
    const bool fine = finite && count > 0 && difference <= allowed;
    std::printf("  %-9s %.1e%s\n", what, difference, fine ? "" : finite ? "  TOO MUCH" : "  NOT FINITE");
    problems += !fine;
}

static void compare(const char *what, const Tensor &got, const std::vector<double> &want) {
    std::vector<double> numbers;
    got.each([&](int b, int h, int i, int c) { numbers.push_back(got(b, h, i, c)); });
    compare(what, want.size(), [&](size_t i) { return numbers[i]; }, [&](size_t i) { return want[i]; }, ALLOWED, true);
    if (!got.gaps_untouched()) {
        std::printf("  %s: written between the rows\n", what);
        problems++;
    }
}

static void check(const Case &call) {
    const int heads = (int)call.key_heads.size(), batch = call.batch, queries = call.queries, keys = call.keys;
    const int key_heads = *std::max_element(call.key_heads.begin(), call.key_heads.end()) + 1;
    const int value_heads = *std::max_element(call.value_heads.begin(), call.value_heads.end()) + 1;
    std::printf("%s, %d queries of %d keys\n", call.name.c_str(), queries, keys);
    std::mt19937 random(7);
    const bool layout = call.how.by_position;
    Tensor q(batch, heads, queries, WIDTH, layout), k(batch, key_heads, keys, WIDTH, !layout);
    Tensor v(batch, value_heads, keys, VALUE_WIDTH, layout), out(batch, heads, queries, VALUE_WIDTH, layout);
    Tensor out_grad(batch, heads, queries, VALUE_WIDTH, !layout), q_grad(batch, heads, queries, WIDTH, layout);
    Tensor k_grad(batch, heads, keys, WIDTH, layout), v_grad(batch, heads, keys, VALUE_WIDTH, !layout);
    for (Tensor *tensor : {&q, &k, &v, &out_grad}) tensor->fill(random);
    std::vector<float> sinks, log_sums(batch * heads * queries, NAN), means(batch * heads * queries);
    for (int h = 0; h < heads; h++) sinks.push_back(0.7f * h - 0.5f);
    const std::vector<int> plan = plan_of(call);
    const int tiles = (queries + 63) / 64;
    const double scale = 0.9 / std::sqrt((double)WIDTH);
    const Call words = {heads,     queries,   keys,        call.how.rows_differ ? 2 * (tiles + queries) : 0,
                        call.how.sinks, scale,    q.strides,   k.strides,
                        v.strides, out.strides, out_grad.strides, q_grad.strides,
                        k_grad.strides, v_grad.strides};
    const auto grid = [&](int rows, int tile) {
        return emulated::Dim{(unsigned)((rows + tile - 1) / tile), (unsigned)heads, (unsigned)batch};
    };

    launch(grid(queries, forward::QUERIES), THREADS, call.how.backwards, [&] {
        forward::attend(q.numbers.data(), k.numbers.data(), v.numbers.data(), sinks.data(), plan.data(), out.numbers.data(),
                        log_sums.data(), &words);
    });

    // The definition.
    std::vector<double> want_out(batch * heads * queries * VALUE_WIDTH), want_log(log_sums.size());
    std::vector<double> want_q(batch * heads * queries * WIDTH), want_k(batch * heads * keys * WIDTH);
    std::vector<double> want_v(batch * heads * keys * VALUE_WIDTH);
    std::vector<bool> counts(log_sums.size());
    for (int b = 0; b < batch; b++)
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < queries; i++) {
                const auto [from, to] = call.seen(call.how.rows_differ ? b : 0, i);
                const int kh = call.key_heads[h], vh = call.value_heads[h];
                const size_t row = ((size_t)b * heads + h) * queries + i;
                std::vector<double> weights(keys), grads(keys);
                double largest = call.how.sinks ? sinks[h] : -INFINITY;
                for (int j = from; j < to; j++) {
                    for (int c = 0; c < WIDTH; c++) weights[j] += scale * q(b, h, i, c) * k(b, kh, j, c);
                    largest = std::max(largest, weights[j]);
                }
                double sum = call.how.sinks ? std::exp(sinks[h] - largest) : 0;
                for (int j = from; j < to; j++) sum += weights[j] = std::exp(weights[j] - largest);
                double mean = 0;
                for (int j = from; j < to; j++) {
                    weights[j] /= sum;
                    for (int c = 0; c < VALUE_WIDTH; c++) {
                        want_out[row * VALUE_WIDTH + c] += weights[j] * v(b, vh, j, c);
                        want_v[(((size_t)b * heads + h) * keys + j) * VALUE_WIDTH + c] += weights[j] * out_grad(b, h, i, c);
                        grads[j] += v(b, vh, j, c) * out_grad(b, h, i, c);
                    }
                    mean += weights[j] * grads[j];
                }
                for (int j = from; j < to; j++)
                    for (int c = 0; c < WIDTH; c++) {
                        const double grad = scale * weights[j] * (grads[j] - mean);
                        want_q[row * WIDTH + c] += grad * k(b, kh, j, c);
                        want_k[(((size_t)b * heads + h) * keys + j) * WIDTH + c] += grad * q(b, h, i, c);
                    }
                counts[row] = from < to || call.how.sinks;
                want_log[row] = counts[row] ? largest + std::log(sum) : 0;
                for (int c = 0; c < VALUE_WIDTH; c++) means[row] += (float)(out(b, h, i, c) * out_grad(b, h, i, c));
            }
    compare("out", out, want_out);
    compare(
        "log sums", log_sums.size(), [&](size_t i) { return counts[i] || std::isnan(log_sums[i]) ? log_sums[i] : 0.0; },
        [&](size_t i) { return want_log[i]; }, ALLOWED_LOG, false);

    launch(grid(queries, queries_back::QUERIES), THREADS, call.how.backwards, [&] {
        queries_back::back_to_queries(q.numbers.data(), k.numbers.data(), v.numbers.data(), out_grad.numbers.data(),
                                      log_sums.data(), means.data(), plan.data(), q_grad.numbers.data(), &words);
    });
    compare("q grad", q_grad, want_q);
    launch(grid(keys, keys_back::KEYS), THREADS, call.how.backwards, [&] {
        keys_back::back_to_keys(q.numbers.data(), k.numbers.data(), v.numbers.data(), out_grad.numbers.data(),
                                log_sums.data(), means.data(), plan.data(), k_grad.numbers.data(), v_grad.numbers.data(),
                                &words);
    });
    compare("k grad", k_grad, want_k);
    compare("v grad", v_grad, want_v);
}

int main(int count, char **arguments) {
    const auto causal = [](int offset) { return [=](int, int i) { return std::pair(0, offset + i + 1); }; };
    std::vector<Case> cases = {
        {"causal", 2, 150, 150, {0, 1, 1}, {1, 0, 0}, causal(0)},
        {"causal, warps the other way round", 1, 130, 130, {0}, {0}, causal(0), {.by_position = false, .backwards = true}},
        {"no mask", 1, 65, 129, {0, 0}, {0, 1}, [](int, int) { return std::pair(0, 129); }},
        {"behind a cache", 1, 17, 90, {0, 0}, {0, 0}, causal(73)},
        {"one whole tile", 1, 64, 64, {0}, {0}, causal(0), {.by_position = false}},
        {"sinks", 1, 70, 70, {0, 1}, {0, 0}, causal(0), {.sinks = true}},
        {"window", 1, 200, 200, {0}, {0}, [](int, int i) { return std::pair(max(0, i - 4), i + 1); }},
        {"window on both sides", 1, 150, 150, {0}, {0}, [](int, int i) { return std::pair(max(0, i - 69), min(150, i + 70)); }},
        {"documents", 2, 150, 150, {0}, {0}, [](int b, int i) { return std::pair(i / (37 + b) * (37 + b), i + 1); },
         {.rows_differ = true}},
        {"lengths, one of them 0", 3, 140, 140, {0}, {0}, [](int b, int) { return std::pair(0, b * 63); }, {.rows_differ = true}},
        {"sinks where nothing is seen", 2, 40, 40, {0}, {0}, [](int b, int) { return std::pair(0, b * 20); },
         {.rows_differ = true, .sinks = true}},
    };
    std::printf("width %d, values %d, %s, %d queries of a warp\n", WIDTH, VALUE_WIDTH, ELEMENT, 16 * SIXTEENS);
    const size_t wanted = count > 1 ? std::atoi(arguments[1]) : cases.size();
    for (size_t i = 0; i < std::min(wanted, cases.size()); i++) check(cases[i]);
    std::printf(problems ? "%d problems\n" : "all agree\n", problems);
    return problems ? 1 : 0;
}
