/* What the parts of the pretended GPU share: how many GPUs there are, and what the host has asked of them.
 * Python reads the counts by ctypes (see ../pretend.py). */
#ifndef PRETENDED_H
#define PRETENDED_H
#include <stddef.h>

enum count { LAUNCHES, WAITS, COPIES_TO_HOST, COPIES_TO_GPU, COLLECTIVES, NUM_COUNTS };

void pretended_add(enum count which);
int pretended_num_gpus(void);  /* the environment's PRETENDED_GPUS */
int pretended_device(void);    /* the current GPU of this thread */

#endif
