// What the kernels on chains say to the hardware: tensor cores, shared memory by address, asynchronous copies.
//
// Shared memory is reached through these functions only, never through pointers: under the emulator (emu/tensor.h has
// the same functions) each access is then checked for its range, for reading what was never written, and for races
// between warps. tests/native/primitives.cu compares every one of them on a GPU with what the emulator takes it to do:
// an intrinsic once compiled to something else than its documentation said (__byte_perm drops the sign-replicating bits
// of its selector).
//
// Fragments of mma.m16n8k16, for lane l, g = l / 4, t = l % 4; a register holds two 16-bit values, the lower one first:
//   A  a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)      (row, first of two columns)
//   B  b0 (2t, g)  b1 (2t + 8, g)                                          (first of two rows k, column n)
//   C  c0, c1 (g, 2t)  c2, c3 (g + 8, 2t)
// mma.m16n8k8 has a0, a1 and b0 only. With tf32 a register holds one value:
//   A  a0 (g, t)  a1 (g + 8, t)  a2 (g, t + 4)  a3 (g + 8, t + 4)     B  b0 (t, g)  b1 (t + 4, g)     C as above
#pragma once
#include "cuda/launch.cuh"

#ifdef TSR_EMU
#include "emu/tensor.h"
#else
#define TSR_DEVICE static __device__ __forceinline__

namespace tsr {

using Shared = uint32_t;  // an address in shared memory, in bytes

TSR_DEVICE Shared shared_address(const void* p) { return Shared(__cvta_generic_to_shared(p)); }

// volatile: else the compiler computes every layer's addresses once, before the loop of steps, and spills them.
TSR_DEVICE uint32_t lane_id() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(r));
  return r;
}
// The same in all lanes, and known to be: branches on it are uniform.
TSR_DEVICE int warp_id() { return __shfl_sync(0xffffffffu, int(threadIdx.x >> 5), 0); }

// A __syncthreads that threads may come to in different places: that one wants all of a warp at the same instruction.
TSR_DEVICE void block_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }

TSR_DEVICE uint32_t load_u32(Shared a) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
TSR_DEVICE float load_f32(Shared a) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a));
  return v;
}
TSR_DEVICE double load_f64(Shared a) {
  double v;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(v) : "r"(a));
  return v;
}
TSR_DEVICE void load_u32x2(uint32_t& x, uint32_t& y, Shared a) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x), "=r"(y) : "r"(a));
}
TSR_DEVICE void load_u32x4(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, Shared a) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "r"(a));
}
TSR_DEVICE void store_u32(Shared a, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
TSR_DEVICE void store_f32(Shared a, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(v) : "memory"); }
TSR_DEVICE void store_f64(Shared a, double v) { asm volatile("st.shared.f64 [%0], %1;" ::"r"(a), "d"(v) : "memory"); }
TSR_DEVICE void store_u32x4(Shared a, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// Four 8x8 matrices of 16-bit values; row r of matrix q is the 16 bytes at lane 8q + r's address. Lane l gets row l /
// 4, columns 2 (l % 4) and the next; _trans: of the transposed matrices.
TSR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}
TSR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], Shared a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a));
}

// d += A B, float32 sums.
TSR_DEVICE void mma_f16_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TSR_DEVICE void mma_f16_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}
TSR_DEVICE void mma_bf16_k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TSR_DEVICE void mma_tf32_k8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The nearest float32 of 11 significant bits (ties away from 0), which is what tensor cores take.
TSR_DEVICE uint32_t round_tf32(float v) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
  return r;
}

// Two float32 to 16 bits each, to nearest even; the lower half is `lo`. _relu: of max(., 0), NaN stays NaN.
TSR_DEVICE uint32_t pack_f16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
TSR_DEVICE uint32_t pack_f16_relu(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
TSR_DEVICE uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
TSR_DEVICE void unpack_f16(uint32_t p, float& lo, float& hi) {
  asm("{.reg .f16 l,h; mov.b32 {l,h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(lo), "=f"(hi) : "r"(p));
}
TSR_DEVICE float half_bits_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
TSR_DEVICE uint16_t float_to_half_bits(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}

// Bit 15 spread over the lower half, bit 31 over the upper one.
TSR_DEVICE uint32_t sign_masks(uint32_t m) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(m), "r"(0u), "n"(0xBB99));
  return r;
}

// 16 bytes from global to shared memory, in the background; zeros where not `there`. Both addresses are multiples
// of 16.
TSR_DEVICE void copy_async_16(Shared to, const void* from, bool there = true) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// The same of 4, 8 or 16 bytes through the first-level cache, which copy_async_16 goes past; both addresses are
// multiples of that.
template <int kBytes>
TSR_DEVICE void copy_async_cached(Shared to, const void* from, bool there = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "");
  const int bytes = there ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes)
               : "memory");
}
TSR_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>  // returns when at most the last kLeft groups of this thread are on their way
TSR_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// An mbarrier (8 bytes in shared memory) completes a phase when `count` arrivals and all announced bytes are there.
TSR_DEVICE void barrier_init(Shared b, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(count) : "memory");
}
TSR_DEVICE void barrier_arrive_expect(Shared b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
// Returns when the phase of that parity (0 the first) has completed.
TSR_DEVICE void barrier_wait(Shared b, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D_%=;\nbra "
      "L_%=;\nD_%=:\n}" ::"r"(b),
      "r"(parity)
      : "memory");
}
// A multiple of 16 bytes from global to shared memory, in the background; reports its bytes to barrier b.
TSR_DEVICE void copy_bulk(Shared to, const void* from, uint32_t bytes, Shared b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(b)
               : "memory");
}
// What this thread has seen of shared memory is done before copies that it starts afterwards.
TSR_DEVICE void fence_before_copy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

// Adds 1, from `last` back to 0; the value before. Orders the memory accesses of the threads that meet here.
TSR_DEVICE uint32_t count_up(Shared a, uint32_t last) {
  uint32_t old;
  asm volatile("atom.acq_rel.cta.shared.inc.u32 %0, [%1], %2;" : "=r"(old) : "r"(a), "r"(last) : "memory");
  return old;
}

}  // namespace tsr
#endif
