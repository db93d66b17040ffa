/* A CUDA runtime without a GPU, for checks of the host's code alone.
 *
 * A GPU's memory is host memory, a copy copies at once, a kernel does nothing. Everything else answers as an H100 would:
 * torch and FBGEMM check devices, pointers and launch shapes against it. What stands here is what must return more than
 * "success"; symbols.py writes the rest. */
#define _GNU_SOURCE
#include "pretended.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- counts ---- */

static long counts[NUM_COUNTS];
static long used_gpus;               /* a bit for each GPU that any thread has used */
static __thread int is_uncounted;    /* this thread does what only the pretence needs */
static __thread int current_device;
static __thread cudaError_t last_error;

void pretended_add(enum count which) { if (!is_uncounted) __sync_fetch_and_add(&counts[which], 1); }
long pretended_count(int which) { return counts[which]; }
void pretended_uncounted(int on) { is_uncounted = on; }
long pretended_used_gpus(void) { return used_gpus; }
void pretended_forget_used_gpus(void) { used_gpus = 0; }
int pretended_device(void) { return current_device; }

int pretended_num_gpus(void) {
  const char *told = getenv("PRETENDED_GPUS");
  return told ? atoi(told) : 1;
}

/* A context is made where a GPU is first used: a process that touches another rank's GPU takes 0.5 GB of it. */
static void use(void) { __sync_fetch_and_or(&used_gpus, 1L << current_device); }

static cudaError_t wait_for_gpu(void) { use(); pretended_add(WAITS); return cudaSuccess; }

/* ---- devices ---- */

static const size_t TOTAL_BYTES = 80000000000, SHARED_BYTES = 49152, SHARED_OPTIN_BYTES = 232448;

cudaError_t cudaGetDeviceCount(int *count) {
  *count = pretended_num_gpus();
  return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= pretended_num_gpus()) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  *found = (struct cudaDeviceProp){
      .name = "NVIDIA H100 80GB HBM3", .totalGlobalMem = TOTAL_BYTES, .major = 9, .minor = 0,
      .multiProcessorCount = 132, .warpSize = 32, .l2CacheSize = 50 << 20, .pciBusID = device + 1,
      .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .maxBlocksPerMultiProcessor = 32,
      .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {2147483647, 65535, 65535},
      .sharedMemPerBlock = SHARED_BYTES, .sharedMemPerBlockOptin = SHARED_OPTIN_BYTES,
      .sharedMemPerMultiprocessor = 233472, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536,
      .textureAlignment = 512, .unifiedAddressing = 1, .managedMemory = 1, .concurrentManagedAccess = 1,
      .concurrentKernels = 1, .canMapHostMemory = 1,
  };
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
  snprintf(text, (size_t)size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  (void)device, (void)peer;
  *can = 1;
  return cudaSuccess;
}

/* ---- memory ---- */

typedef struct { char *start; size_t bytes; enum cudaMemoryType type; int device; } Range;

static Range ranges[1 << 16];
static int num_ranges;
static size_t bytes_of_gpu[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Pages are taken when they are written: tables of 80 GB cost nothing until then. */
static cudaError_t allocate(void **pointer, size_t bytes, enum cudaMemoryType type) {
  use();
  bytes = ((bytes ? bytes : 1) + 4095) & ~(size_t)4095;
  *pointer = NULL;
  pthread_mutex_lock(&lock);
  int i = 0;
  while (i < num_ranges && ranges[i].start) i++;
  int fits = type != cudaMemoryTypeDevice || bytes_of_gpu[current_device] + bytes <= TOTAL_BYTES;
  void *start = MAP_FAILED;
  if (fits && i < (int)(sizeof ranges / sizeof *ranges))
    start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start != MAP_FAILED) {
    ranges[i] = (Range){start, bytes, type, current_device};
    if (i == num_ranges) num_ranges++;
    if (type == cudaMemoryTypeDevice) bytes_of_gpu[current_device] += bytes;
    *pointer = start;
  }
  pthread_mutex_unlock(&lock);
  if (*pointer) return cudaSuccess;
  return last_error = cudaErrorMemoryAllocation;
}

static cudaError_t release(void *pointer) {
  pthread_mutex_lock(&lock);
  for (int i = 0; pointer && i < num_ranges; i++)
    if (ranges[i].start == pointer) {
      munmap(pointer, ranges[i].bytes);
      if (ranges[i].type == cudaMemoryTypeDevice) bytes_of_gpu[ranges[i].device] -= ranges[i].bytes;
      ranges[i].start = NULL;
      break;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate(p, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t s) { (void)s; return cudaMalloc(p, bytes); }
cudaError_t cudaMallocManaged(void **p, size_t bytes, unsigned f) { (void)f; return allocate(p, bytes, cudaMemoryTypeManaged); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned f) { (void)f; return allocate(p, bytes, cudaMemoryTypeHost); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { (void)s; return release(p); }
cudaError_t cudaFreeHost(void *p) { return release(p); }

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
  (void)flags;
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  *found = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .hostPointer = (void *)pointer};
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_ranges; i++) {
    Range r = ranges[i];
    if (!r.start || (char *)pointer < r.start || (char *)pointer >= r.start + r.bytes) continue;
    *found = (struct cudaPointerAttributes){.type = r.type, .device = r.device, .devicePointer = (void *)pointer};
    found->hostPointer = r.type == cudaMemoryTypeDevice ? NULL : (void *)pointer;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = TOTAL_BYTES;
  *free_bytes = TOTAL_BYTES - bytes_of_gpu[current_device];
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { (void)symbol; return cudaMalloc(pointer, 4096); }

static cudaError_t copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  use();
  if (kind == cudaMemcpyDeviceToHost) pretended_add(COPIES_TO_HOST);
  if (kind == cudaMemcpyHostToDevice) pretended_add(COPIES_TO_GPU);
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  pretended_add(WAITS);
  return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s) {
  (void)s;
  return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t s) {
  (void)a, (void)b, (void)s;
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t s) {
  (void)kind, (void)s;
  for (size_t row = 0; row < height; row++) memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
  return cudaSuccess;
}

/* Large memory is zero already, and would be taken if it were written. */
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) {
  (void)s;
  if (value || bytes < (1 << 26)) memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, NULL); }

/* ---- streams and events ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
  (void)flags, (void)priority;
  use();
  *s = malloc(8);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreateWithPriority(s, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { free(s); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { (void)s; *priority = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }

cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  (void)s;
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *num_nodes) {
  (void)id, (void)graph, (void)nodes, (void)edges, (void)num_nodes;
  return cudaStreamIsCapturing(s, status);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
  (void)flags;
  use();
  *e = malloc(8);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  (void)start, (void)end;
  *ms = 0.01f;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t s) { (void)s; return wait_for_gpu(); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { (void)e; return wait_for_gpu(); }
cudaError_t cudaDeviceSynchronize(void) { return wait_for_gpu(); }

/* ---- kernels ---- */

/* The shape is checked as a GPU checks it: a grid of no blocks is FBGEMM's or torch's mistake, or ours. */
static cudaError_t launch(dim3 grid, dim3 block) {
  use();
  size_t threads = (size_t)block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024)
    return last_error = cudaErrorInvalidConfiguration;
  pretended_add(LAUNCHES);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  (void)f, (void)args, (void)shared, (void)s;
  return launch(grid, block);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  (void)f, (void)args, (void)shared, (void)s;
  return launch(grid, block);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **args) {
  (void)f, (void)args;
  return launch(config->gridDim, config->blockDim);
}

cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t s) {
  (void)f, (void)args, (void)shared, (void)s;
  return launch(grid, block);
}

/* What nvcc's <<<grid, block>>> is made of. */
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block;
  configuration.shared = shared, configuration.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *(void **)stream = configuration.stream;
  return cudaSuccess;
}

/* Programs register their kernels when they are loaded; there is nothing to do with them. */
static int handle;
void **__cudaRegisterFatBinary(void *binary) { (void)binary; return (void **)&handle; }
char __cudaInitModule(void **module) { (void)module; return 1; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f) {
  (void)f;
  *found = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90, .ptxVersion = 90,
                                       .maxDynamicSharedSizeBytes = (int)SHARED_OPTIN_BYTES};
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared,
                                                                   unsigned flags) {
  (void)f, (void)block, (void)shared, (void)flags;
  *n = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, block, shared, 0);
}

/* ---- errors, and the driver's functions by name ---- */

cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
  cudaError_t found = last_error;
  last_error = cudaSuccess;
  return found;
}
const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : e == cudaErrorMemoryAllocation ? "out of memory" : "an error of the pretended GPU";
}
const char *cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaErrorPretended"; }

static int nothing(void) { return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  (void)version, (void)flags;
  void *found = dlsym(RTLD_DEFAULT, name);
  *function = found ? found : (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
