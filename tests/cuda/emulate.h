// CUDA on a processor: runs the kernels of crates/kernels/src/cuda as they are, a block after the other, in the place of device.cuh.
//
// Every thread of a block is a context of its own that runs until it waits: for its block (`__syncthreads`), or for its warp (shuffles, matrices
// read and multiplied together). A warp therefore runs ahead of the others as far as it can, and a missing wait shows. Asynchronous
// copies happen when they are waited for, not before, and shared memory holds NaN when a block starts. Fragments are those that the PTX ISA
// documents for `mma.m16n8k16` and `ldmatrix`.
#pragma once

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// In a section of its own, so that it can be filled before a block starts.
#define __shared__ __attribute__((section("shared_memory"))) static

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

using std::max;
using std::min;

namespace emulated {

constexpr int WARP = 32;

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

// What the threads of a warp lay before each other.
struct Exchange {
    u32 words[WARP][16];
    const void *places[WARP];
};

struct Copy {
    void *to;
    const void *from;
    int bytes;
    bool there;
};

struct Thread {
    ucontext_t start;
    jmp_buf place;
    bool begun = false, ended = false;
    long block_waits = 0, warp_waits = 0;
    std::vector<Copy> copies;
    std::unique_ptr<char[]> stack;
};

inline std::vector<Thread> threads;
inline std::vector<Exchange> exchanges;
inline std::vector<int> arrived_of_warp;
inline int arrived_of_block = 0;
inline long block_round = 0;
inline std::vector<long> warp_round;
inline int current = 0;
// Grows whenever a thread comes to a wait or to its end.
inline long steps = 0;
inline jmp_buf scheduler;
inline std::function<void()> body;

[[noreturn]] inline void fail(const char *why) {
    std::fprintf(stderr, "emulated: %s\n", why);
    std::exit(1);
}

// Back to the scheduler, which comes back when it is this thread's turn again.
inline void yield() {
    if (_setjmp(threads[current].place) == 0) _longjmp(scheduler, 1);
}

inline void wait_for_block() {
    const long round = block_round;
    steps++;
    if (++arrived_of_block == (int)threads.size()) {
        arrived_of_block = 0;
        block_round++;
        return;
    }
    while (block_round == round) yield();
}

inline void wait_for_warp() {
    const int warp = current / WARP;
    const long round = warp_round[warp];
    steps++;
    if (++arrived_of_warp[warp] == WARP) {
        arrived_of_warp[warp] = 0;
        warp_round[warp]++;
        return;
    }
    while (warp_round[warp] == round) yield();
}

inline Exchange &exchange() { return exchanges[current / WARP]; }

inline float wide(u16 bits) {
    const bool bf16 = ELEMENT[0] == 'b';
    if (bf16) {
        const u32 word = (u32)bits << 16;
        float x;
        std::memcpy(&x, &word, 4);
        return x;
    }
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return (float)x;
}

// To the nearest, ties to even.
inline u16 narrow(float x) {
    if (ELEMENT[0] != 'b') {
        const _Float16 half = (_Float16)x;
        u16 bits;
        std::memcpy(&bits, &half, 2);
        return bits;
    }
    u32 word;
    std::memcpy(&word, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline void run_thread() {
    body();
    threads[current].ended = true;
    steps++;
    _longjmp(scheduler, 1);
}

// Lets a thread run until it waits, or to its end.
inline void resume(int index) {
    current = index;
    if (_setjmp(scheduler) == 0) {
        Thread &thread = threads[index];
        if (thread.begun) _longjmp(thread.place, 1);
        thread.begun = true;
        constexpr size_t STACK = 256 << 10;
        if (!thread.stack) thread.stack.reset(new char[STACK]);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, run_thread, 0);
        setcontext(&thread.start);
    }
}

extern "C" char __start_shared_memory, __stop_shared_memory;

// Runs every thread of a block to its end, the warps from first to last or the other way round.
inline void run_block(bool backwards) {
    std::memset(&__start_shared_memory, 0xff, &__stop_shared_memory - &__start_shared_memory);
    const int count = (int)threads.size();
    arrived_of_block = 0;
    std::fill(arrived_of_warp.begin(), arrived_of_warp.end(), 0);
    for (Thread &thread : threads) {
        thread.begun = thread.ended = false;
        thread.copies.clear();
    }
    const auto all_ended = [] {
        return std::all_of(threads.begin(), threads.end(), [](const Thread &thread) { return thread.ended; });
    };
    while (!all_ended()) {
        const long before = steps;
        for (int turn = 0; turn < count / WARP; turn++) {
            const int first = (backwards ? count / WARP - 1 - turn : turn) * WARP;
            // Until all of the warp waits for the block.
            long reached;
            do {
                reached = steps;
                for (int index = first; index < first + WARP; index++)
                    if (!threads[index].ended) resume(index);
            } while (steps != reached);
        }
        if (steps == before) fail("threads wait for others that never come");
    }
    for (const Thread &thread : threads)
        for (const Copy &copy : thread.copies)
            if (copy.bytes) fail("a copy is never waited for");
}

} // namespace emulated

inline emulated::Dim blockIdx, gridDim;

struct ThreadIndex {
    struct {
        operator int() const { return emulated::current; }
    } x;
};
inline ThreadIndex threadIdx;

inline void __syncthreads() { emulated::wait_for_block(); }

inline float __shfl_xor_sync(u32, float value, int distance) {
    const int lane = threadIdx.x % 32;
    std::memcpy(&emulated::exchange().words[lane][0], &value, 4);
    emulated::wait_for_warp();
    float other;
    std::memcpy(&other, &emulated::exchange().words[lane ^ distance][0], 4);
    emulated::wait_for_warp();
    return other;
}

inline bool __all_sync(u32, bool value) {
    emulated::exchange().words[threadIdx.x % 32][0] = value;
    emulated::wait_for_warp();
    bool all = true;
    for (const auto &words : emulated::exchange().words) all = all && words[0];
    emulated::wait_for_warp();
    return all;
}

inline u16 half_of(u32 word, int upper) { return (u16)(word >> 16 * upper); }

inline void multiply(float (&sums)[4], const u32 (&left)[4], u32 right0, u32 right1) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto &words = emulated::exchange().words;
    std::memcpy(words[lane], left, 16);
    words[lane][4] = right0;
    words[lane][5] = right1;
    emulated::wait_for_warp();
    // A[row][k] lies in lane (row % 8) * 4 + k % 8 / 2, register (k / 8) * 2 + row / 8; B[k][column] in lane column * 4 + k % 8 / 2, register k / 8.
    for (int i = 0; i < 4; i++) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        float sum = sums[i];
        for (int k = 0; k < 16; k++) {
            const u16 a = half_of(words[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8], k % 2);
            const u16 b = half_of(words[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
            sum += emulated::wide(a) * emulated::wide(b);
        }
        sums[i] = sum;
    }
    emulated::wait_for_warp();
}

inline void read_matrices_as(u32 (&matrices)[4], const u16 *row, bool transposed) {
    if ((uintptr_t)row % 16) emulated::fail("a row of a matrix does not start at 16 bytes");
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto &places = emulated::exchange().places;
    places[lane] = row;
    emulated::wait_for_warp();
    for (int matrix = 0; matrix < 4; matrix++) {
        const auto at = [&](int row, int column) { return ((const u16 *)places[8 * matrix + row])[column]; };
        const u16 first = transposed ? at(2 * t, g) : at(g, 2 * t);
        const u16 second = transposed ? at(2 * t + 1, g) : at(g, 2 * t + 1);
        matrices[matrix] = first | (u32)second << 16;
    }
    emulated::wait_for_warp();
}

inline void read_matrices(u32 (&matrices)[4], const u16 *row) { read_matrices_as(matrices, row, false); }
inline void read_transposed(u32 (&matrices)[4], const u16 *row) { read_matrices_as(matrices, row, true); }

inline void begin_copy(void *to, const void *from, int bytes, bool there) {
    if ((uintptr_t)to % bytes || (there && (uintptr_t)from % bytes)) emulated::fail("a copy is not aligned");
    emulated::threads[emulated::current].copies.push_back({to, from, bytes, there});
}
inline void copy_16(void *to, const void *from, bool there) { begin_copy(to, from, 16, there); }
inline void copy_4(void *to, const void *from, bool there) { begin_copy(to, from, 4, there); }

inline void wait_for_copies() {
    auto &copies = emulated::threads[emulated::current].copies;
    for (const emulated::Copy &copy : copies)
        copy.there ? (void)std::memcpy(copy.to, copy.from, copy.bytes) : (void)std::memset(copy.to, 0, copy.bytes);
    copies.clear();
}

inline u32 rounded(float first, float second) {
    return emulated::narrow(first) | (u32)emulated::narrow(second) << 16;
}

inline float power_of_two(float x) { return std::exp2(x); }

// Runs `kernel` for every block of a grid.
inline void launch(emulated::Dim grid, int threads, bool backwards, std::function<void()> kernel) {
    emulated::threads.resize(threads);
    emulated::exchanges.resize(threads / emulated::WARP);
    emulated::arrived_of_warp.resize(threads / emulated::WARP);
    emulated::warp_round.resize(threads / emulated::WARP);
    emulated::body = std::move(kernel);
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                emulated::run_block(backwards);
            }
}
