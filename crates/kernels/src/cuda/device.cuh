// What the kernels of this folder ask of a GPU of compute capability 8.0 or above: tensor cores, copies that go on by themselves. Everything
// else is C++, so that tests/cuda/emulate.h can take the place of this file and run the kernels on a processor.
//
// ELEMENT is the type of the operands, "bf16" or "f16", as instructions name it.

typedef unsigned short u16; // an operand
typedef unsigned int u32; // two of them, the first in the lower half
typedef long long i64;

// sums += left · right for 16 rows, 8 columns and 16 products each. With g = lane / 4 and t = lane % 4 a thread has
// left: rows g, g + 8 of columns 2t, 2t + 1, then the same rows of columns 2t + 8, 2t + 9;
// right: column g of rows 2t, 2t + 1, then of rows 2t + 8, 2t + 9;
// sums: columns 2t, 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&left)[4], u32 right0, u32 right1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// Four matrices of 8 by 8. Lane i names row i % 8 of matrix i / 8 in shared memory; of each matrix a thread gets columns 2t, 2t + 1 of row g.
__device__ __forceinline__ void read_matrices(u32 (&matrices)[4], const u16 *row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(at)
                 : "memory");
}

// The same transposed: rows 2t, 2t + 1 of column g.
__device__ __forceinline__ void read_transposed(u32 (&matrices)[4], const u16 *row) {
    u32 at = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(at)
                 : "memory");
}

// Begins to copy 16 aligned bytes into shared memory, or zeros where there is nothing.
__device__ __forceinline__ void copy_16(void *to, const void *from, bool there) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// The same of 4 bytes.
__device__ __forceinline__ void copy_4(void *to, const void *from, bool there) {
    u32 at = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(there ? 4 : 0) : "memory");
}

// Waits until all copies that this thread began have ended.
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ u32 rounded(float first, float second) {
    u32 both;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// 2^x, 0 for -infinity
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
