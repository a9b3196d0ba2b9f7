// The card, as the kernels see it: one function for each PTX instruction that CUDA C++ has no name for, and the few
// built-in names they use. tests/native/hopper_emulator.h has the same functions for the CPU.
//
// Instruction references are to the PTX ISA, "Parallel Synchronization and Communication" (mbarrier), "Data Movement"
// (cp.async.bulk.tensor) and "Asynchronous Warpgroup Level Matrix Instructions" (wgmma).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "hopper_wgmma.h"

#define GSSF_DEVICE __device__ __forceinline__
#define GSSF_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define GSSF_GRID __grid_constant__ const

namespace gssf::chip {

using TensorMap = CUtensorMap;  // a matrix in device memory and the box that one load copies
using Barrier = uint64_t;       // an mbarrier: a phase ends when all arrivals and all announced bytes have come

GSSF_DEVICE int thread() { return threadIdx.x; }
GSSF_DEVICE int block() { return blockIdx.x; }
GSSF_DEVICE int blocks() { return gridDim.x; }

GSSF_DEVICE uint32_t address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// The block's dynamic shared memory as an S, on the 1024 bytes that the swizzle repeats after.
template <class S>
GSSF_DEVICE S& shared_memory() {
  extern __shared__ unsigned char gssf_shared[];
  return *reinterpret_cast<S*>(gssf_shared + (-address(gssf_shared) & 1023));
}

// Warps.

GSSF_DEVICE float larger(float x, float y) {  // NaN if either is
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
  return most;
}

GSSF_DEVICE float exponential(float x) {  // e^x; 0 for what would be subnormal
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}

// score = factor score, in place: with a plain product the compiler keeps both, and runs out of registers.
GSSF_DEVICE void scale(float& score, float factor) {
  asm volatile("mul.rn.f32 %0, %0, %1;" : "+f"(score) : "f"(factor));
}

GSSF_DEVICE float logarithm(float x) { return logf(x); }

template <class T>
GSSF_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFF, value, lanes);
}

GSSF_DEVICE void lower(int* shared, int value) { atomicMin(shared, value); }  // *shared = min(*shared, value)
GSSF_DEVICE int lowest_bit(uint32_t bits) { return __ffs(bits) - 1; }

// Barriers of threads: all of the block, or `threads` of it under a number of its own (1 to 15).

GSSF_DEVICE void sync_block() { __syncthreads(); }

GSSF_DEVICE void sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

GSSF_DEVICE bool sync_any(int barrier, int threads, bool flag) {  // whether any thread's flag is set
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(static_cast<uint32_t>(flag))
      : "memory");
  return any != 0;
}

// mbarriers.

GSSF_DEVICE void init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}

GSSF_DEVICE void publish_barriers() {  // makes init visible to the copy engine; sync_block() makes it so to threads
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

GSSF_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

GSSF_DEVICE void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

// Returns once the phase of that parity is over. Only for the phase now running, or the one just before it.
GSSF_DEVICE void wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}

// The copy engine (TMA).

GSSF_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Copies the map's box from (row, channel) on into shared memory, zeros where it is outside the matrix; the barrier
// counts all bytes of the box in either case.
GSSF_DEVICE void load(void* shared, const TensorMap& map, int row, int channel, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(channel), "r"(row), "r"(address(barrier))
      : "memory");
}

// Registers move between warpgroups: the one that loads needs few.

template <int COUNT>
GSSF_DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
GSSF_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

}  // namespace gssf::chip
