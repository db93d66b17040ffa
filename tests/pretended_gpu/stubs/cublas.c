/* cuBLAS of a pretended GPU: handles and descriptors that are something, and products that only count.
 * Its header wants more than comes with the wheels, so pointers are plain here. */
#include "pretended.h"

#include <stdlib.h>
#include <string.h>

#define CREATES(name) int name(void **made) { *made = calloc(1, 256); return 0; }
#define FREES(name) int name(void *made) { free(made); return 0; }
#define ZERO(name) int name(void *handle, int *value) { (void)handle; *value = 0; return 0; }

CREATES(cublasCreate_v2) FREES(cublasDestroy_v2)
CREATES(cublasLtCreate) FREES(cublasLtDestroy)
CREATES(cublasLtMatmulDescCreate) FREES(cublasLtMatmulDescDestroy)
CREATES(cublasLtMatrixLayoutCreate) FREES(cublasLtMatrixLayoutDestroy)
CREATES(cublasLtMatmulPreferenceCreate) FREES(cublasLtMatmulPreferenceDestroy)
ZERO(cublasGetMathMode) ZERO(cublasGetPointerMode_v2)

/* One algorithm, in a struct of the header's size. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int num_wanted, void *found, int *num_found) {
  (void)handle, (void)product, (void)a, (void)b, (void)c, (void)d, (void)preference, (void)num_wanted;
  memset(found, 0, 128);
  *num_found = 1;
  return 0;
}

/* What torch calls for float32, bfloat16 and float16; each counts as one launch. */
#define PRODUCT(name) int name(void) { pretended_add(LAUNCHES); return 0; }

PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasLtMatmul)
