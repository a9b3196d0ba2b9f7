// The card, as the launcher sees it: its properties, tensor maps and launches, over the CUDA runtime and PyTorch's
// stable ABI alone. tests/native/hopper_emulator.h has the same for the CPU.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // makes PyTorch's headers declare the CUDA part of the stable ABI
#endif
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "hopper_ptx.h"

namespace gssf::chip {

// The device of a tensor, made current for as long as this lives, and the stream that PyTorch works on there.
class Device {
 public:
  int processors = 0;

  explicit Device(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    int major = 0, minor = 0;
    const int index = x.get_device_index();
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    STD_TORCH_CHECK(major == 9 && minor == 0, "expected a device of compute capability 9.0 (wgmma), got ", major, ".",
                    minor);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &stream) == 0, "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // kernel<<<grid, threads>>>(arguments) with `shared` bytes of shared memory.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t grid, int threads, int shared, const Arguments&... arguments) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    kernel<<<static_cast<unsigned>(grid), threads, shared, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The driver's cuTensorMapEncodeTiled, loaded at run time: nothing links against the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
#else
    STD_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess && function, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

// x [rows, channels] of 16-bit numbers, rows `row_bytes` apart, read in boxes of box_rows by 64 channels.
inline TensorMap tensor_map(hopper::Number number, const void* x, int64_t rows, int64_t channels, int64_t row_bytes,
                            int box_rows) {
  const auto type = number == hopper::Number::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(rows)};
  const cuuint64_t distance[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {hopper::kDepth, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
  TensorMap map;
  const CUresult result = tensor_map_encoder()(&map, type, 2, const_cast<void*>(x), size, distance, box, every,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled gave error ", static_cast<int>(result));
  return map;
}

}  // namespace gssf::chip
