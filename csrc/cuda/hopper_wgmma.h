// wgmma: a warpgroup's matrix product, from shared memory into registers.
//
//     s[OFFSET : OFFSET + COLUMNS / 2]  (64 x COLUMNS over the warpgroup)  (+)=  a [64, 16] bᵀ [16, COLUMNS]
//
// Products run asynchronously: call begin_products() before the first product after any other use of s, then
// multiply(...), commit_products(), and finish_products(s) before s is read.
#pragma once

#include <cstdint>

#include "sweep_layout.h"

namespace gssf::chip {

using hopper::Number;

template <Number NUMBER, int COLUMNS, int OFFSET>
struct Product;

#define GSSF_S4(k) "+f"(s[k]), "+f"(s[k + 1]), "+f"(s[k + 2]), "+f"(s[k + 3])
#define GSSF_S16(k) GSSF_S4(k), GSSF_S4(k + 4), GSSF_S4(k + 8), GSSF_S4(k + 12)
#define GSSF_S64(k) GSSF_S16(k), GSSF_S16(k + 16), GSSF_S16(k + 32), GSSF_S16(k + 48)
#define GSSF_S128(k) GSSF_S64(k), GSSF_S64(k + 64)

// clang-format off
#define GSSF_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, " \
  "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GSSF_NAMES_128 GSSF_NAMES_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
  "%122, %123, %124, %125, %126, %127"
// clang-format on

// The operands after the scores: both descriptors, and whether to add to s or to overwrite it. Then 1, 1, 0, 0: neither
// operand negated, neither transposed (channels adjacent in both).
#define GSSF_PRODUCT(NUMBER, NAME, COLUMNS, NAMES, SCORES, A, B, ADD)                                              \
  template <int OFFSET>                                                                                            \
  struct Product<NUMBER, COLUMNS, OFFSET> {                                                                        \
    static __device__ __forceinline__ void run(float (&s)[hopper::kScores], uint64_t a, uint64_t b, bool add) {    \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                                     \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" NAMES "}, " A ", " B \
                   ", add, 1, 1, 0, 0;\n}\n"                                                                       \
                   : SCORES                                                                                        \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                  \
    }                                                                                                              \
  };

#define GSSF_PRODUCTS(NUMBER, NAME)                                                     \
  GSSF_PRODUCT(NUMBER, NAME, 128, GSSF_NAMES_64, GSSF_S64(OFFSET), "%64", "%65", "%66") \
  GSSF_PRODUCT(NUMBER, NAME, 256, GSSF_NAMES_128, GSSF_S128(OFFSET), "%128", "%129", "%130")
GSSF_PRODUCTS(Number::bf16, "bf16")
GSSF_PRODUCTS(Number::fp16, "f16")

template <Number NUMBER, int COLUMNS, int OFFSET>
__device__ __forceinline__ void multiply(float (&s)[hopper::kScores], uint64_t a, uint64_t b, bool add) {
  Product<NUMBER, COLUMNS, OFFSET>::run(s, a, b, add);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all but the last group of this warp's products: their operands may then be overwritten.
__device__ __forceinline__ void all_but_one_over() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// Waits for all; s then holds their sums. s is an operand here, so that the compiler reads it only afterwards.
__device__ __forceinline__ void finish_products(float (&s)[hopper::kScores]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : GSSF_S128(0)::"memory");
}

#undef GSSF_PRODUCTS
#undef GSSF_PRODUCT
#undef GSSF_NAMES_128
#undef GSSF_NAMES_64
#undef GSSF_S128
#undef GSSF_S64
#undef GSSF_S16
#undef GSSF_S4

}  // namespace gssf::chip
