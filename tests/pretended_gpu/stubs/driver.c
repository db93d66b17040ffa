/* libcuda.so.1 of a pretended GPU: the few functions of the driver that must return more than "success". */
#include <cuda.h>

static int context;

long pretended_used_gpus(void) __attribute__((weak)); /* of runtime.c, which is preloaded */

CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)&context; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { (void)device; return cuCtxGetCurrent(c); }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *is_active) {
  *flags = 0;
  *is_active = pretended_used_gpus ? (pretended_used_gpus() >> device) & 1 : 1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult e, const char **text) { (void)e; *text = "an error of the pretended driver"; return CUDA_SUCCESS; }
