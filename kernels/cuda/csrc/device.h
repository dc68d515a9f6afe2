// What the kernels need of the device beyond plain C++: memory, tensor cores, barriers, clusters, launches.
//
// Two builds: nvcc for GPUs (this file) and, with ML_CUDA_EMULATED, any C++17 compiler for the CPU (emulated.h has
// the same names). All that differs between them is in these two files.
//
// Numbers of 16 bit are kept as bits: uint16_t in memory, two in a word of a register. Bf16 and Fp16 say which.
#pragma once

#include <cstdint>

namespace ml {

constexpr int WARP = 32;

struct Bf16 {
    static constexpr float LARGEST = 3.3895313892515355e38f;
};
struct Fp16 {
    static constexpr float LARGEST = 65504.0f;
};

template <int N>
struct alignas(4 * N) Words {  // 2 N numbers of 16 bit
    uint32_t at[N];
};

struct alignas(8) Pair {
    float first, second;
};

}  // namespace ml

#ifdef ML_CUDA_EMULATED
#include "emulated.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ML_DEVICE __device__ __forceinline__
#define ML_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ML_SHARED(Type, name) __shared__ Type name
#define ML_UNROLL _Pragma("unroll")
#define ML_ROLL _Pragma("unroll 1")

namespace ml {

// Read anew at each place: else what follows from it for one phase of a kernel is kept in registers during all others.
ML_DEVICE int thread_of_block() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// The same address, made at this place: else the compiler keeps every address of a loop in registers of its own.
template <class Value>
ML_DEVICE Value* made_here(Value* address) {
    asm volatile("" : "+l"(address));
    return address;
}

// Memory. Addresses are aligned to what is read or written: 2, 4, 8 or 16 bytes.

// Anything that earlier kernels may have written.
template <class Value>
ML_DEVICE Value load(const Value* from) {
    return *from;
}

template <>
ML_DEVICE Words<4> load(const Words<4>* from) {
    const uint4 got = *reinterpret_cast<const uint4*>(from);
    return {{got.x, got.y, got.z, got.w}};
}

// What nothing writes while the kernel is there: the arena's weights. Past the first cache, which they only pass through.
template <int N>
ML_DEVICE Words<N> load_constant(const uint16_t* from);

template <>
ML_DEVICE Words<4> load_constant<4>(const uint16_t* from) {
    Words<4> got;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(got.at[0]), "=r"(got.at[1]), "=r"(got.at[2]), "=r"(got.at[3])
                 : "l"(from));
    return got;
}

template <>
ML_DEVICE Words<2> load_constant<2>(const uint16_t* from) {
    Words<2> got;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(got.at[0]), "=r"(got.at[1]) : "l"(from));
    return got;
}

ML_DEVICE void store(uint16_t* to, const Words<4>& value) {
    *reinterpret_cast<uint4*>(to) = make_uint4(value.at[0], value.at[1], value.at[2], value.at[3]);
}

ML_DEVICE void store(uint16_t* to, uint16_t value) { *to = value; }

// Ask for the 128 bytes around an address to be brought into the second cache.
ML_DEVICE void prefetch(const uint16_t* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

ML_DEVICE float float_of_bits(int32_t bits) { return __int_as_float(bits); }

// Two numbers in a word, the first in its low half; rounded to the nearest, ties to even.

template <class T>
ML_DEVICE Pair unpack(uint32_t word);

template <>
ML_DEVICE Pair unpack<Bf16>(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

template <>
ML_DEVICE Pair unpack<Fp16>(uint32_t word) {
    const float2 both = __half22float2(*reinterpret_cast<__half2*>(&word));
    return {both.x, both.y};
}

template <class T>
ML_DEVICE uint32_t pack(float first, float second);

template <>
ML_DEVICE uint32_t pack<Bf16>(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
}

template <>
ML_DEVICE uint32_t pack<Fp16>(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
}

// Tensor cores, by a whole warp: sum [16, 8] += a [16, 16] b [16, 8], fp32 sums. Lane 4 g + t has of
// a      rows g, g + 8, g, g + 8 at columns 2 t and 2 t + 1, the last two words 8 columns on
// b      column g at rows 2 t and 2 t + 1, the second word 8 rows on
// sum    row g at columns 2 t and 2 t + 1, then row g + 8
template <class T>
ML_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define ML_MMA(type)                                                                                                \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                     \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                  \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
ML_DEVICE void multiply<Bf16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ML_MMA("bf16");
}

template <>
ML_DEVICE void multiply<Fp16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ML_MMA("f16");
}

// Barriers and clusters. A cluster of one block has neither rank nor neighbours, and runs on every GPU.

ML_DEVICE void block_wait() { __syncthreads(); }

template <int CLUSTER>
ML_DEVICE int rank_in_cluster() {
    return static_cast<int>(blockIdx.x) % CLUSTER;  // clusters are made of neighbouring blocks, in their order
}

template <int CLUSTER>
ML_DEVICE int cluster_of_grid() {
    return static_cast<int>(blockIdx.x) / CLUSTER;
}

template <int CLUSTER>
ML_DEVICE int clusters_of_grid() {
    return static_cast<int>(gridDim.x) / CLUSTER;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Every thread of the cluster arrives, then waits until all have: what was written before is seen after.
ML_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
ML_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The same variable in the shared memory of the cluster's block `rank`.
ML_DEVICE Pair load_from(const Pair* mine, int rank) {
    const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
    uint32_t there;
    Pair got;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(got.first), "=f"(got.second) : "r"(there));
    return got;
}

// Until the kernels before this one have ended and what they wrote is seen; at once where there is no such launch.
ML_DEVICE void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#else

ML_DEVICE void cluster_arrive() {}
ML_DEVICE void cluster_wait() {}
ML_DEVICE Pair load_from(const Pair* mine, int) { return *mine; }
ML_DEVICE void grid_wait() {}

#endif

// Launch `kernel` with `clusters` clusters. is_early: it may begin while the kernel before it still runs, see grid_wait.
// Returns a cudaError_t.
template <class Args>
int launch(void (*kernel)(Args), const Args& args, int clusters, int cluster, int threads, bool is_early, void* stream) {
    cudaLaunchAttribute attributes[2];
    unsigned int count = 0;
    if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = static_cast<unsigned int>(cluster);
        attributes[count].val.clusterDim.y = 1;
        attributes[count++].val.clusterDim.z = 1;
    }
    if (is_early) {
        attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned int>(clusters * cluster));
    config.blockDim = dim3(static_cast<unsigned int>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = count;
    return static_cast<int>(cudaLaunchKernelEx(&config, kernel, args));
}

// Clusters of `kernel` that fit the device at once; at least 1.
template <class Args>
int resident_clusters(void (*kernel)(Args), int cluster, int threads) {
    int device = 0, processors = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (cluster == 1) {
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, 0);
        count *= processors;
    } else {
        cudaLaunchAttribute attribute;
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned int>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned int>(cluster));
        config.blockDim = dim3(static_cast<unsigned int>(threads));
        config.attrs = &attribute;
        config.numAttrs = 1;
        cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    }
    return count > 0 ? count : 1;
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace ml

#endif  // ML_CUDA_EMULATED
