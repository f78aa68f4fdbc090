// The names of cuBLAS that Caffe's headers mention, to compile a layer where only CUDA's compiler is installed.
#pragma once
typedef struct cublasContext* cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS } cublasStatus_t;
