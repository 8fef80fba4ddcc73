// The part of the CUDA runtime that launches kernels, for a library that nvcc makes without it.
// Its functions are those that the host code of CUDA 13.0's nvcc calls.
#include <map>
#include <string_view>

#include "machine.h"

extern "C" {

int cuModuleLoadData(void** module, const void* image);
int cuModuleGetFunction(void** function, void* module, const char* name);
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** params, void** extra);
}

namespace {

using ptxsim::Dim;

struct Image {  // fatbinary_section.h
  int magic, version;
  const uint64_t* data;  // its second word is the number of bytes that follow
};

struct Configuration {  // what stands in <<<>>>
  Dim grid, block;
  size_t shared;
  void* stream;
} configuration;

int last_error = 0;

std::map<const void*, void*>& kernels() {  // by the function of the host that launches them
  static std::map<const void*, void*> all;
  return all;
}

}  // namespace

extern "C" {

// With nvcc's option --no-compress the PTX lies in the image as text.
void** __cudaRegisterFatBinary(const Image* image) {
  static void* module = nullptr;
  const auto* text = reinterpret_cast<const char*>(image->data);
  const size_t version = std::string_view(text, image->data[1]).find(".version");
  last_error = cuModuleLoadData(&module, text + version);
  return &module;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** module, const void* host_function, char*, const char* name, int,
                            void*, void*, void*, void*, int*) {
  if (last_error == 0) last_error = cuModuleGetFunction(&kernels()[host_function], *module, name);
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void** stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *stream = configuration.stream;
  return 0;
}

int __cudaGetKernel(void** kernel, const void* host_function) {
  *kernel = kernels()[host_function];
  return 0;
}

int __cudaLaunchKernel(void* kernel, Dim grid, Dim block, void** params, size_t shared,
                       void* stream) {
  if (kernel) {
    last_error = cuLaunchKernel(kernel, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                static_cast<unsigned>(shared), stream, params, nullptr);
  }
  return last_error;
}

int cudaGetLastError() { return last_error; }

}  // extern "C"
