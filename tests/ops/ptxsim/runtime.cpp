// The part of the CUDA runtime that launches kernels: what the host code of nvcc 13.0 calls.
#include <map>
#include <string_view>

#include "driver.h"
#include "machine.h"

namespace ptxsim {
namespace {

struct Image {  // fatbinary_section.h
  int magic, version;
  const uint64_t* data;  // the second word is the number of bytes that follow
};

struct Configuration {  // what stands in <<<>>>
  Dim grid, block;
  size_t shared;
  void* stream;
} configuration;

std::map<const void*, Function*> functions;  // by the host's function of the same name
int last_error = kSuccess;

}  // namespace
}  // namespace ptxsim

extern "C" {

using namespace ptxsim;

// With nvcc's option --no-compress the PTX lies in the image as text.
Module** __cudaRegisterFatBinary(const Image* image) {
  const auto* text = reinterpret_cast<const char*>(image->data);
  const size_t version = std::string_view(text, image->data[1]).find(".version");
  auto** module = new Module*(nullptr);
  cuModuleLoadData(module, text + version);
  return module;
}

void __cudaRegisterFatBinaryEnd(Module**) {}
void __cudaUnregisterFatBinary(Module** module) { delete module; }

void __cudaRegisterFunction(Module** module, const void* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  if (*module) cuModuleGetFunction(&functions[host], *module, name);
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void** stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *stream = configuration.stream;
  return kSuccess;
}

int __cudaGetKernel(Function** function, const void* host) {
  *function = functions[host];
  return kSuccess;
}

int __cudaLaunchKernel(Function* function, Dim grid, Dim block, void** params, size_t shared,
                       void* stream) {
  last_error = !function
                   ? kNotFound
                   : cuLaunchKernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                    static_cast<unsigned>(shared), stream, params, nullptr);
  return last_error;
}

int cudaGetLastError() { return last_error; }

}  // extern "C"
