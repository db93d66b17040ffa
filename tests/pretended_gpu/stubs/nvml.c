/* libnvidia-ml.so.1 of a pretended GPU: how many there are and the driver's version; nothing else is supported. */
#include "pretended.h"

#include <string.h>

int pretended_num_gpus(void) __attribute__((weak)); /* of runtime.c, which is preloaded */

int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.00", size); return 0; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = (unsigned)pretended_num_gpus(); return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(size_t)(index + 1); return 0; }

#define NOT_SUPPORTED(name) int name(void) { return 3; }

NOT_SUPPORTED(nvmlDeviceGetHandleByPciBusId_v2)
NOT_SUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
NOT_SUPPORTED(nvmlDeviceGetNvLinkState)
NOT_SUPPORTED(nvmlDeviceGetPciInfo_v3)
