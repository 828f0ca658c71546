// LibTorch's stable ABI at target 2.11 (one library for every torch from 2.11 on, with and without CUDA, and every Python), the stream, checked tensors.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>

// Only torch with CUDA has this symbol: weak, so that the library loads on CPU torch too (in tests).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

extern "C" const char* cuda_error_text(int code);  // what a launcher's return code means

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void* current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}

// "Int [8, 2], not contiguous, on cuda:0"
inline std::string describe(const Tensor& tensor) {
  std::string text = torch::headeronly::toString(tensor.scalar_type()) + std::string(" [");
  for (int64_t i = 0; i < tensor.dim(); i++) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  text += tensor.is_contiguous() ? "]" : "], not contiguous";
  return text + (tensor.is_cuda() ? " on cuda:" + std::to_string(tensor.get_device_index()) : " not on a GPU");
}

// The data of `tensor`, an argument of the operator `op`: contiguous, of `type`, on `device`, of at least `elements`.
template <class T>
T* checked(const char* op, const Tensor& tensor, const char* name, ScalarType type, int32_t device, int64_t elements) {
  const bool fits = tensor.is_cuda() && tensor.get_device_index() == device && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() >= elements;
  STD_TORCH_CHECK(fits, op, ": expected ", name, " to be contiguous ", type == ScalarType::Int ? "int32" : torch::headeronly::toString(type), " of at least ", elements,
                  " elements on cuda:", device, ", got ", describe(tensor));
  return static_cast<T*>(tensor.mutable_data_ptr());
}
