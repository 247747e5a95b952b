/* A CUDA runtime with one device and nothing behind it, loaded before the real one (LD_PRELOAD; see conftest.py).

   torch then finds a GPU, and takes the branches of one. Whatever would reach the device, beyond asking what it is, still
   ends in the real runtime, which finds no driver and says so; and waiting for it is an error. */

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

/* What torch asks before it chooses an attention kernel; of an H200. */
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "fake");
    properties->major = 9;
    properties->multiProcessorCount = 132;
    properties->warpSize = 32;
    properties->totalGlobalMem = 141ul << 30;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->sharedMemPerBlockOptin = 227 << 10;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return cudaErrorNotPermitted; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaErrorNotPermitted; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaErrorNotPermitted; }

/* The driver's own; torch asks whether somebody has used the device. */
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return CUDA_SUCCESS;
}
