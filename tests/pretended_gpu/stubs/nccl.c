/* NCCL of a pretended GPU: every other rank is a copy of this one. Sizes and order are as they would be, values are not. */
#include "pretended.h"

#include <stdlib.h>
#include <string.h>

/* As in nccl.h, which wants more headers than come with the wheels. */
typedef enum { ncclSuccess, ncclInternalError = 3 } ncclResult_t;
typedef enum { ncclInt32 = 2, ncclUint32, ncclInt64, ncclUint64, ncclFloat16, ncclFloat32, ncclFloat64, ncclBfloat16 } ncclDataType_t;
typedef struct { char bytes[128]; } ncclUniqueId;
typedef struct { int num_ranks, rank; } *ncclComm_t;
typedef void ncclConfig_t;
typedef void *cudaStream_t;
typedef int ncclRedOp_t;

/* torch splits a communicator by a colour from which the ranks of the new one cannot be told: Python tells them before. */
static int next_num_ranks, next_rank;
void pretended_next_split(int num_ranks, int rank) { next_num_ranks = num_ranks, next_rank = rank; }

static ncclResult_t make(ncclComm_t *comm, int num_ranks, int rank) {
  *comm = malloc(sizeof **comm);
  (*comm)->num_ranks = num_ranks, (*comm)->rank = rank;
  return ncclSuccess;
}

ncclResult_t ncclGetVersion(int *version) { *version = 22907; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 7, sizeof *id); return ncclSuccess; }
ncclResult_t ncclCommInitRank(ncclComm_t *c, int n, ncclUniqueId id, int rank) { (void)id; return make(c, n, rank); }
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId id, int rank, ncclConfig_t *config) { (void)id, (void)config; return make(c, n, rank); }
ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int n, int rank, int num_ids, ncclUniqueId *ids, ncclConfig_t *config) { (void)num_ids, (void)ids, (void)config; return make(c, n, rank); }

ncclResult_t ncclCommSplit(ncclComm_t parent, int color, int key, ncclComm_t *comm, ncclConfig_t *config) {
  (void)key, (void)config;
  *comm = NULL;
  if (color < 0) return ncclSuccess;
  return next_num_ranks ? make(comm, next_num_ranks, next_rank) : make(comm, parent->num_ranks, parent->rank);
}

ncclResult_t ncclCommCount(const ncclComm_t c, int *n) { *n = c->num_ranks; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) { *rank = c->rank; return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *e) { (void)c; *e = ncclSuccess; return ncclSuccess; }
const char *ncclGetErrorString(ncclResult_t e) { (void)e; return "an error of the pretended NCCL"; }
const char *ncclGetLastError(ncclComm_t c) { (void)c; return ""; }

static size_t bytes_of(size_t n, ncclDataType_t type) {
  switch (type) {
    case ncclFloat64: case ncclInt64: case ncclUint64: return 8 * n;
    case ncclFloat32: case ncclInt32: case ncclUint32: return 4 * n;
    case ncclFloat16: case ncclBfloat16: return 2 * n;
    default: return n;
  }
}

static void move(void *to, const void *from, size_t bytes) { if (to != from && bytes) memmove(to, from, bytes); }

ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
  (void)op, (void)c, (void)s;
  pretended_add(COLLECTIVES);
  move(out, in, bytes_of(n, t));
  return ncclSuccess;
}

ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op, int root, ncclComm_t c, cudaStream_t s) {
  (void)root;
  return ncclAllReduce(in, out ? out : (void *)in, n, t, op, c, s);
}

ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t t, int root, ncclComm_t c, cudaStream_t s) {
  (void)root;
  return ncclAllReduce(in, out, n, t, 0, c, s);
}

ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
  (void)op, (void)s;
  pretended_add(COLLECTIVES);
  move(out, (const char *)in + c->rank * bytes_of(n, t), bytes_of(n, t));
  return ncclSuccess;
}

ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
  (void)s;
  pretended_add(COLLECTIVES);
  for (int rank = 0; rank < c->num_ranks; rank++) move((char *)out + rank * bytes_of(n, t), in, bytes_of(n, t));
  return ncclSuccess;
}

ncclResult_t ncclAlltoAll(const void *in, void *out, size_t n, ncclDataType_t t, ncclComm_t c, cudaStream_t s) {
  (void)s;
  pretended_add(COLLECTIVES);
  for (int rank = 0; rank < c->num_ranks; rank++)
    move((char *)out + rank * bytes_of(n, t), (const char *)in + c->rank * bytes_of(n, t), bytes_of(n, t));
  return ncclSuccess;
}

/* Between start and end of a group: what this rank sends itself is what it receives from every rank. */
static __thread struct { void *to; size_t bytes; } received[4096];
static __thread int num_received, depth;
static __thread const void *sent;
static __thread size_t sent_bytes;

static void end_group(void) {
  if (num_received) pretended_add(COLLECTIVES);
  for (int i = 0; sent && i < num_received; i++)
    move(received[i].to, sent, received[i].bytes < sent_bytes ? received[i].bytes : sent_bytes);
  num_received = 0, sent = NULL, sent_bytes = 0;
}

ncclResult_t ncclGroupStart(void) { depth++; return ncclSuccess; }

ncclResult_t ncclGroupEnd(void) {
  if (--depth <= 0) { depth = 0; end_group(); }
  return ncclSuccess;
}

ncclResult_t ncclSend(const void *from, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
  (void)s;
  if (peer == c->rank) sent = from, sent_bytes = bytes_of(n, t);
  return ncclSuccess;
}

ncclResult_t ncclRecv(void *to, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
  (void)peer, (void)c, (void)s;
  if (num_received == 4096) return ncclInternalError;
  received[num_received].to = to, received[num_received++].bytes = bytes_of(n, t);
  if (!depth) end_group();
  return ncclSuccess;
}
