// The part of the CUDA driver API that launches kernels.
#pragma once

namespace ptxsim {

struct Module;
struct Function;

enum Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidPtx = 218,
  kNotFound = 500,
  kIllegalAddress = 700,
  kOutOfResources = 701,
  kLaunchFailed = 719
};

}  // namespace ptxsim

extern "C" {

int cuModuleLoadData(ptxsim::Module** module, const void* image);
int cuModuleGetFunction(ptxsim::Function** function, ptxsim::Module* module, const char* name);
int cuLaunchKernel(ptxsim::Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                   unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                   void** extra);

}  // extern "C"
