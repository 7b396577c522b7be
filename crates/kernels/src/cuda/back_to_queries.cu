// Gradients of a tile of queries of a head: the weights are made again from the logs of their sums, tile by tile of keys.
//
// `means` are the mean gradients of each row's weights, the products of the rows of output and its gradient.

constexpr int KEYS = 32;
constexpr int QUERIES = 16 * WARPS;
constexpr int BUFFER = KEYS * (PLACE<WIDTH> + PLACE<VALUE_WIDTH>);
constexpr int QUERY_TILES = QUERIES * (PLACE<WIDTH> + PLACE<VALUE_WIDTH>);
constexpr int SHARED = 2 * BUFFER > QUERY_TILES ? 2 * BUFFER : QUERY_TILES;

extern "C" __global__ void __launch_bounds__(THREADS) back_to_queries(
    const u16 *__restrict__ q,
    const u16 *__restrict__ k,
    const u16 *__restrict__ v,
    const u16 *__restrict__ out_grad,
    const float *__restrict__ log_sums,
    const float *__restrict__ means,
    const int *__restrict__ plan_numbers,
    u16 *__restrict__ q_grad,
    const Call *__restrict__ call_words) {
    __shared__ __align__(16) u16 shared[SHARED];
    const Call &call = *call_words;
    const Plan plan(plan_numbers, call);
    const int head = blockIdx.y, lane = threadIdx.x % 32, own_rows = threadIdx.x / 32 * 16;
    const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;

    u32 queries[1][WIDTH / 16][4], grads[1][VALUE_WIDTH / 16][4];
    const u16 *grad_tile = shared + QUERIES * PLACE<WIDTH>;
    copy_both<QUERIES>(
        shared, Rows<const u16>(q, call.q, head, first_query, call.queries),
        Rows<const u16>(out_grad, call.out_grad, head, first_query, call.queries));
    wait_for_copies();
    __syncthreads();
    read_rows<WIDTH>(queries[0], shared + own_rows * PLACE<WIDTH>);
    read_rows<VALUE_WIDTH>(grads[0], grad_tile + own_rows * PLACE<VALUE_WIDTH>);
    __syncthreads();

    // Of the two rows of a thread.
    const float scale = (float)call.scale * LOG2_E;
    int seen_from[2], seen_to[2];
    float log_sum[2], mean[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int query = first_query + own_rows + lane / 4 + 8 * half;
        const i64 row = (blockIdx.z * call.heads + head) * call.queries + query;
        plan.range(query, seen_from[half], seen_to[half]);
        log_sum[half] = query < call.queries ? log_sums[row] * LOG2_E : 0.0f;
        mean[half] = query < call.queries ? means[row] : 0.0f;
    }
    float sums[1][WIDTH / 8][4];
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

        float weights[1][KEYS / 8][4], weight_grads[1][KEYS / 8][4];
        row_products<1, KEYS, WIDTH>(weights, queries, keys);
        row_products<1, KEYS, VALUE_WIDTH>(weight_grads, grads, values);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            hide<KEYS>(weights[0], half, first, seen_from[half], seen_to[half]);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    const float weight = power_of_two(weights[0][n][i] * scale - log_sum[half]);
                    weights[0][n][i] = weight * (weight_grads[0][n][i] - mean[half]);
                }
        }
        add_products<1, KEYS, WIDTH>(sums, weights, keys);
    }
    const Rows<u16> grad_rows(q_grad, call.q_grad, head, first_query, call.queries);
    write_rows(grad_rows, own_rows, sums[0], (float)call.scale, (float)call.scale);
}
