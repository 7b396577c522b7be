// What comes back to a tile of keys and its values from one query head. Heads that are shared get theirs from every query head, added up
// afterwards in one order.
//
// A warp has sixteen keys with their values in registers, as operands, and both gradients. Queries, with what belongs to them, come through
// shared memory in two buffers; tiles of queries that reach no key here are left out.

constexpr int KEYS = 16 * WARPS;
constexpr int QUERIES = WIDTH + VALUE_WIDTH <= 128 ? 32 : 16;
// Numbers of a buffer: queries, then gradients of outputs, then four words for each query.
constexpr int TILES = QUERIES * (PLACE<WIDTH> + PLACE<VALUE_WIDTH>);
constexpr int BUFFER = TILES + QUERIES * 8;
constexpr int KEY_TILES = KEYS * (PLACE<WIDTH> + PLACE<VALUE_WIDTH>);
constexpr int SHARED = 2 * BUFFER > KEY_TILES ? 2 * BUFFER : KEY_TILES;

extern "C" __global__ void __launch_bounds__(THREADS) back_to_keys(
    const u16 *__restrict__ q,
    const u16 *__restrict__ k,
    const u16 *__restrict__ v,
    const u16 *__restrict__ out_grad,
    const float *__restrict__ log_sums,
    const float *__restrict__ means,
    const int *__restrict__ plan_numbers,
    u16 *__restrict__ k_grad,
    u16 *__restrict__ v_grad,
    const Call *__restrict__ call_words) {
    __shared__ __align__(16) u16 shared[SHARED];
    const Call &call = *call_words;
    const Plan plan(plan_numbers, call);
    const int head = blockIdx.y, lane = threadIdx.x % 32, own_rows = threadIdx.x / 32 * 16;
    const int first_key = blockIdx.x * KEYS, queries = (int)call.queries;

    u32 keys[1][WIDTH / 16][4], values[1][VALUE_WIDTH / 16][4];
    const u16 *value_tile = shared + KEYS * PLACE<WIDTH>;
    copy_both<KEYS>(
        shared, Rows<const u16>(k, call.k, plan.key_head, first_key, call.keys),
        Rows<const u16>(v, call.v, plan.value_head, first_key, call.keys));
    wait_for_copies();
    __syncthreads();
    read_rows<WIDTH>(keys[0], shared + own_rows * PLACE<WIDTH>);
    read_rows<VALUE_WIDTH>(values[0], value_tile + own_rows * PLACE<VALUE_WIDTH>);
    __syncthreads();

    const float scale = (float)call.scale * LOG2_E;
    const i64 first_row = (blockIdx.z * call.heads + head) * call.queries;
    float k_sums[1][WIDTH / 8][4], v_sums[1][VALUE_WIDTH / 8][4];
    clear(k_sums);
    clear(v_sums);

    // The first queries from `query` on of whose tile any reaches a key here.
    const auto next = [&](int query) {
        for (; query < queries; query = (query / PLAN_TILE + 1) * PLAN_TILE) {
            const int *span = plan.spans + query / PLAN_TILE * 2;
            if (span[0] < first_key + KEYS && span[1] > first_key) break;
        }
        return query;
    };
    const auto copy = [&](int first, int buffer) {
        u16 *tile = shared + buffer * BUFFER;
        copy_both<QUERIES>(
            tile, Rows<const u16>(q, call.q, head, first, call.queries),
            Rows<const u16>(out_grad, call.out_grad, head, first, call.queries));
        // Of each query: log of the sum, mean gradient; first key and end.
        u32 *words = (u32 *)(tile + TILES);
        for (int index = threadIdx.x; index < 4 * QUERIES; index += THREADS) {
            const int kind = index / QUERIES, query = first + index % QUERIES;
            const void *from = kind == 0   ? (const void *)(log_sums + first_row + query)
                               : kind == 1 ? (const void *)(means + first_row + query)
                                           : (const void *)(plan.ranges + 2 * query + kind - 2);
            const bool there = query < queries;
            copy_4(words + index, there ? from : plan_numbers, there);
        }
    };
    int first = next(0);
    if (first < queries) copy(first, 0);
    for (int buffer = 0; first < queries; buffer ^= 1) {
        wait_for_copies();
        __syncthreads();
        const int after = next(first + QUERIES);
        if (after < queries) copy(after, buffer ^ 1);
        const u16 *query_tile = shared + buffer * BUFFER, *grad_tile = query_tile + QUERIES * PLACE<WIDTH>;
        const float *log_sum = (const float *)(query_tile + TILES), *mean = log_sum + QUERIES;
        const int *seen_from = (const int *)(mean + QUERIES), *seen_to = seen_from + QUERIES;

        float weights[1][QUERIES / 8][4], grads[1][QUERIES / 8][4];
        row_products<1, QUERIES, WIDTH>(weights, keys, query_tile);
        row_products<1, QUERIES, VALUE_WIDTH>(grads, values, grad_tile);
        // Under most masks most queries see all keys of a warp.
        const int first_own = first_key + own_rows, any = lane % QUERIES;
        if (!__all_sync(~0u, seen_from[any] <= first_own && first_own + 16 <= seen_to[any]))
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int query = 8 * n + lane % 4 * 2 + i % 2, key = first_own + lane / 4 + i / 2 * 8;
                    if (key < seen_from[query] || key >= seen_to[query]) weights[0][n][i] = HIDDEN;
                }
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int query = 8 * n + lane % 4 * 2 + i % 2;
                const float weight = power_of_two(weights[0][n][i] * scale - log_sum[query] * LOG2_E);
                weights[0][n][i] = weight;
                grads[0][n][i] = weight * (grads[0][n][i] - mean[query]);
            }
        add_products<1, QUERIES, VALUE_WIDTH>(v_sums, weights, grad_tile);
        add_products<1, QUERIES, WIDTH>(k_sums, grads, query_tile);
        first = after;
    }
    write_rows(Rows<u16>(k_grad, call.k_grad, head, first_key, call.keys), own_rows, k_sums[0], (float)call.scale, (float)call.scale);
    write_rows(Rows<u16>(v_grad, call.v_grad, head, first_key, call.keys), own_rows, v_sums[0], 1.0f, 1.0f);
}
