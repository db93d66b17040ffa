/* Stands in for NVIDIA's library where there is no driver (driverless.py): every function that FBGEMM 1.8 takes of it
 * answers that the driver is not loaded. Made on x86-64, for which alone FBGEMM has CUDA builds, by
 *
 *   gcc -shared -nostdlib -Os -s -Wl,-soname,libnvidia-ml.so.1,--build-id=none,-z,noseparate-code -o libnvidia-ml.so.1 nvml.c
 */
#define NOT_LOADED(name) int name(void) { return 9; } /* NVML_ERROR_DRIVER_NOT_LOADED */
NOT_LOADED(nvmlInit_v2)
NOT_LOADED(nvmlDeviceGetCount_v2)
NOT_LOADED(nvmlDeviceGetHandleByIndex_v2)
NOT_LOADED(nvmlDeviceGetPciInfo_v3)
NOT_LOADED(nvmlDeviceGetNvLinkState)
NOT_LOADED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
