// The attention kernels as they are in ops/csrc, compiled for the host.

#include "cuda/attention_backward.cu"
#include "cuda/attention_forward.cu"

extern "C" void reverse_threads(int reversed) { irpe::cuda::host::g_reversed = reversed; }
