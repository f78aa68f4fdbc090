// The names of cuRAND that Caffe's headers mention, to compile a layer where only CUDA's compiler is installed.
#pragma once
typedef struct curandGenerator_st* curandGenerator_t;
typedef enum { CURAND_STATUS_SUCCESS } curandStatus_t;
