// Tiles of attention for tensor cores: rows of heads in shared memory, and products of 16 rows a warp with all rows of a tile.
//
// WIDTH is that of queries and keys, VALUE_WIDTH that of values: multiples of 16 up to 128. Rows in shared memory are 8 numbers longer than they are
// wide: the 8 rows that are read together then start in different banks.

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
// Queries of a tile of the plan (`TILE` in attention/gpu/tiles.rs).
constexpr int PLAN_TILE = 64;
constexpr float LOG2_E = 1.4426950408889634f;

// Distances in numbers from one row of the batch, head and position to the next.
struct Strides {
    i64 batch, head, row;
};

// What a kernel is told besides tensors: words of 8 bytes, in the order of `words` (attention/gpu/tensor_cores.rs).
struct Call {
    i64 heads, queries, keys;
    // Numbers of the plan from one row of the batch to the next.
    i64 plan_row;
    i64 sunk;
    double scale;
    Strides q, k, v, out, out_grad, q_grad, k_grad, v_grad;
};

// The heads and the mask (`plan` in attention/gpu.rs): the key head and the value head of each query head; then, for each row of the batch, the
// keys that each tile of 64 queries reaches, and those that each query sees, as first and end.
struct Plan {
    const int *spans;
    const int *ranges;
    int queries;
    int key_head, value_head;

    __device__ __forceinline__ Plan(const int *plan, const Call &call) {
        const int head = blockIdx.y;
        const int tiles = ((int)call.queries + PLAN_TILE - 1) / PLAN_TILE;
        spans = plan + 2 * call.heads + blockIdx.z * call.plan_row;
        ranges = spans + 2 * tiles;
        queries = (int)call.queries;
        key_head = plan[2 * head];
        value_head = plan[2 * head + 1];
    }

    // The keys that COUNT queries reach.
    template <int COUNT>
    __device__ __forceinline__ void span(int first_query, int &from, int &to) const {
        from = to = 0;
        for (int query = first_query; query < first_query + COUNT && query < queries; query += PLAN_TILE) {
            const int *own = spans + query / PLAN_TILE * 2;
            if (own[0] < own[1]) {
                from = from < to ? min(from, own[0]) : own[0];
                to = max(to, own[1]);
            }
        }
    }

    // The keys that a query sees; none for one that is not there.
    __device__ __forceinline__ void range(int query, int &from, int &to) const {
        from = query < queries ? ranges[2 * query] : 0;
        to = query < queries ? ranges[2 * query + 1] : 0;
    }
};

// Rows of a head from one position on: as many as there are.
template <typename NUMBER>
struct Rows {
    NUMBER *first;
    i64 stride;
    int count;

    __device__ __forceinline__ Rows(NUMBER *tensor, const Strides &strides, int head, int from, i64 all)
        : first(tensor + blockIdx.z * strides.batch + head * strides.head + from * strides.row),
          stride(strides.row),
          count((int)all - from) {}
};

template <int COLUMNS>
constexpr int PLACE = COLUMNS + 8;

// Begins to copy so many rows; those that are not there become zeros.
template <int COUNT, int COLUMNS>
__device__ __forceinline__ void copy_rows(u16 *tile, const Rows<const u16> &rows) {
    constexpr int VECTORS = COLUMNS / 8, TURNS = (COUNT * VECTORS + THREADS - 1) / THREADS;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        const int index = threadIdx.x + turn * THREADS;
        if (COUNT * VECTORS % THREADS != 0 && index >= COUNT * VECTORS) break;
        const int row = index / VECTORS, column = index % VECTORS * 8;
        const bool there = row < rows.count;
        copy_16(tile + row * PLACE<COLUMNS> + column, rows.first + (there ? row * rows.stride + column : 0), there);
    }
}

// Begins to copy what belongs to so many positions of a head: rows of WIDTH, keys or queries, and behind them rows of VALUE_WIDTH, values or
// gradients of outputs.
template <int COUNT>
__device__ __forceinline__ void copy_both(u16 *tile, const Rows<const u16> &rows, const Rows<const u16> &wide) {
    copy_rows<COUNT, WIDTH>(tile, rows);
    copy_rows<COUNT, VALUE_WIDTH>(tile + COUNT * PLACE<WIDTH>, wide);
}

// 16 rows of a tile as left operand.
template <int COLUMNS>
__device__ __forceinline__ void read_rows(u32 (&left)[COLUMNS / 16][4], const u16 *tile) {
    const int lane = threadIdx.x % 32;
    const u16 *own = tile + lane % 16 * PLACE<COLUMNS> + lane / 16 * 8;
#pragma unroll
    for (int at = 0; at < COLUMNS / 16; at++) read_matrices(left[at], own + 16 * at);
}

// products[m] = left[m] · tileᵀ for COUNT rows of a tile.
template <int ROWS, int COUNT, int COLUMNS>
__device__ __forceinline__ void row_products(
    float (&products)[ROWS][COUNT / 8][4], const u32 (&left)[ROWS][COLUMNS / 16][4], const u16 *tile) {
    const int lane = threadIdx.x % 32;
    const u16 *own = tile + (lane % 8 + lane / 16 * 8) * PLACE<COLUMNS> + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int n = 0; n < COUNT / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) products[m][n][i] = 0.0f;
#pragma unroll
    for (int at = 0; at < COLUMNS / 16; at++)
#pragma unroll
        for (int n = 0; n < COUNT / 16; n++) {
            u32 right[4];
            read_matrices(right, own + 16 * n * PLACE<COLUMNS> + 16 * at);
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                multiply(products[m][2 * n], left[m][at], right[0], right[1]);
                multiply(products[m][2 * n + 1], left[m][at], right[2], right[3]);
            }
        }
}

// sums[m] += left[m] · tile, where left is what `row_products` made and is rounded to operands.
template <int ROWS, int COUNT, int COLUMNS>
__device__ __forceinline__ void add_products(
    float (&sums)[ROWS][COLUMNS / 8][4], const float (&left)[ROWS][COUNT / 8][4], const u16 *tile) {
    const int lane = threadIdx.x % 32;
    const u16 *own = tile + lane % 16 * PLACE<COLUMNS> + lane / 16 * 8;
#pragma unroll
    for (int at = 0; at < COUNT / 16; at++) {
        u32 operand[ROWS][4];
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            const float(&near)[4] = left[m][2 * at], (&far)[4] = left[m][2 * at + 1];
            operand[m][0] = rounded(near[0], near[1]);
            operand[m][1] = rounded(near[2], near[3]);
            operand[m][2] = rounded(far[0], far[1]);
            operand[m][3] = rounded(far[2], far[3]);
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++) {
            u32 right[4];
            read_transposed(right, own + 16 * at * PLACE<COLUMNS> + 16 * n);
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                multiply(sums[m][2 * n], operand[m], right[0], right[1]);
                multiply(sums[m][2 * n + 1], operand[m], right[2], right[3]);
            }
        }
    }
}

// The score of a key that is not seen.
#define HIDDEN (-1.0f / 0.0f)

// Hides of COUNT keys from `first` on those that a row does not see. A thread has two rows of every sixteen.
template <int COUNT>
__device__ __forceinline__ void hide(float (&scores)[COUNT / 8][4], int half, int first, int seen_from, int seen_to) {
    if (seen_from <= first && first + COUNT <= seen_to) return;
#pragma unroll
    for (int n = 0; n < COUNT / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int key = first + 8 * n + threadIdx.x % 4 * 2 + j;
            if (key < seen_from || key >= seen_to) scores[n][2 * half + j] = HIDDEN;
        }
}

template <int ROWS, int VECTORS>
__device__ __forceinline__ void clear(float (&sums)[ROWS][VECTORS][4]) {
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
        for (int n = 0; n < VECTORS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[m][n][i] = 0.0f;
}

// Writes 16 rows of sums, the upper 8 times `upper` and the lower 8 times `lower`, as far as there are rows from `first` on.
template <int VECTORS>
__device__ __forceinline__ void write_rows(
    const Rows<u16> &rows, int first, const float (&sums)[VECTORS][4], float upper, float lower) {
    const int lane = threadIdx.x % 32, row = first + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (row < rows.count)
            *(u32 *)(rows.first + row * rows.stride + 8 * n + column) = rounded(sums[n][0] * upper, sums[n][1] * upper);
        if (row + 8 < rows.count)
            *(u32 *)(rows.first + (row + 8) * rows.stride + 8 * n + column) =
                rounded(sums[n][2] * lower, sums[n][3] * lower);
    }
}
