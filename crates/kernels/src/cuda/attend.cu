// Attention in tiles (FlashAttention-2, Dao 2023, arXiv 2307.08691): output, and log of the sum of exponentials, of a tile of queries of a head.
//
// A block has four warps; a warp has its queries in registers, as operands, and so its part of the output.
// Keys and values come through shared memory in two buffers: one is filled while the other is used. The blocks with the last queries start
// first: under a causal mask they have most to do.

// A warp has 16 times SIXTEENS queries, as far as its registers go: what is read of a tile then serves all of them.
constexpr int QUERIES = 16 * SIXTEENS * WARPS;
constexpr int KEYS = 32;
// Numbers of a buffer: keys, then values.
constexpr int BUFFER = KEYS * (PLACE<WIDTH> + PLACE<VALUE_WIDTH>);
constexpr int QUERY_TILE = QUERIES * PLACE<WIDTH>;
constexpr int SHARED = 2 * BUFFER > QUERY_TILE ? 2 * BUFFER : QUERY_TILE;

// The largest of a row, and the sum, over the four threads that share it.
__device__ __forceinline__ float largest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(
    const u16 *__restrict__ q,
    const u16 *__restrict__ k,
    const u16 *__restrict__ v,
    const float *__restrict__ sinks,
    const int *__restrict__ plan_numbers,
    u16 *__restrict__ out,
    float *__restrict__ log_sums,
    const Call *__restrict__ call_words) {
    __shared__ __align__(16) u16 shared[SHARED];
    const Call &call = *call_words;
    const Plan plan(plan_numbers, call);
    const int head = blockIdx.y, lane = threadIdx.x % 32, own_rows = threadIdx.x / 32 * 16 * SIXTEENS;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;

    u32 queries[SIXTEENS][WIDTH / 16][4];
    copy_rows<QUERIES, WIDTH>(shared, Rows<const u16>(q, call.q, head, first_query, call.queries));
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) read_rows<WIDTH>(queries[m], shared + (own_rows + 16 * m) * PLACE<WIDTH>);
    __syncthreads();

    // Of the rows of a thread, two in every sixteen: the keys that they see, the largest score so far and the sum of exponentials, in powers of 2.
    const float scale = (float)call.scale * LOG2_E;
    int seen_from[SIXTEENS][2], seen_to[SIXTEENS][2];
    float largest[SIXTEENS][2], sum[SIXTEENS][2];
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            plan.range(first_query + own_rows + 16 * m + lane / 4 + 8 * half, seen_from[m][half], seen_to[m][half]);
            largest[m][half] = call.sunk ? sinks[head] * LOG2_E : -1e30f;
            sum[m][half] = call.sunk && lane % 4 == 0 ? 1.0f : 0.0f;
        }
    float sums[SIXTEENS][VALUE_WIDTH / 8][4];
    clear(sums);

    const auto copy = [&](int first, int buffer) {
        copy_both<KEYS>(
            shared + buffer * BUFFER, Rows<const u16>(k, call.k, plan.key_head, first, call.keys),
            Rows<const u16>(v, call.v, plan.value_head, first, call.keys));
    };
    int from, to;
    plan.span<QUERIES>(first_query, from, to);
    if (from < to) copy(from, 0);
    for (int first = from, buffer = 0; first < to; first += KEYS, buffer ^= 1) {
        wait_for_copies();
        __syncthreads();
        if (first + KEYS < to) copy(first + KEYS, buffer ^ 1);
        const u16 *keys = shared + buffer * BUFFER, *values = keys + KEYS * PLACE<WIDTH>;

        float weights[SIXTEENS][KEYS / 8][4];
        row_products<SIXTEENS, KEYS, WIDTH>(weights, queries, keys);
#pragma unroll
        for (int m = 0; m < SIXTEENS; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                hide<KEYS>(weights[m], half, first, seen_from[m][half], seen_to[m][half]);
                float top = HIDDEN;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    top = fmaxf(top, fmaxf(weights[m][n][2 * half], weights[m][n][2 * half + 1]));
                top = fmaxf(largest[m][half], largest_of_row(top) * scale);
                const float factor = power_of_two(largest[m][half] - top);
                largest[m][half] = top;
                float total = sum[m][half] * factor;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int j = 2 * half; j < 2 * half + 2; j++)
                        total += weights[m][n][j] = power_of_two(weights[m][n][j] * scale - top);
                sum[m][half] = total;
#pragma unroll
                for (int n = 0; n < VALUE_WIDTH / 8; n++)
#pragma unroll
                    for (int j = 2 * half; j < 2 * half + 2; j++) sums[m][n][j] *= factor;
            }
        add_products<SIXTEENS, KEYS, VALUE_WIDTH>(sums, weights, values);
    }

    const Rows<u16> out_rows(out, call.out, head, first_query, call.queries);
#pragma unroll
    for (int m = 0; m < SIXTEENS; m++) {
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float total = fmaxf(sum_of_row(sum[m][half]), 1.17549435e-38f);
            inverse[half] = 1.0f / total;
            const int query = first_query + own_rows + 16 * m + lane / 4 + 8 * half;
            if (lane % 4 == 0 && query < call.queries)
                log_sums[(blockIdx.z * call.heads + head) * call.queries + query] =
                    largest[m][half] / LOG2_E + logf(total);
        }
        write_rows(out_rows, own_rows + 16 * m, sums[m], inverse[0], inverse[1]);
    }
}
