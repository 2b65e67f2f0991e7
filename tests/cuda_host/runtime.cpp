// The CUDA runtime as far as dpo_fast/_cuda.pyx calls it, for the kernels on the host: devices that are numbers only.
#include <cuda_runtime_api.h>

namespace {
int current = 0, sets = 0;
}

extern "C" {
// How often a device was made the current one; which one is.
int cuda_host_device_sets() { return sets; }
int cuda_host_device() { return current; }

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  current = device;
  ++sets;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheHost"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the kernels on the host"; }
}
