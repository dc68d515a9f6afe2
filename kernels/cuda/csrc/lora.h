// y += w (B (A x) + bias) for all slices of a packed projection in one launch: the low-rank delta of a decode step.
#pragma once

#include <cstdint>

namespace ml {

// The plan is kernels/triton/plan.py's, of tiles of at most 16 rows and without sets; the table kernels/types.py's.
// Pointers are the device's. Offsets and strides count elements.
struct LoraArgs {
    uint16_t* y;              // [rows, stride_y]
    const uint16_t* x;        // [rows, stride_x], of which in_features count
    const uint16_t* arena;    // at a multiple of 16 bytes; sites in it at multiples of 128
    const int64_t* table;     // [slots, site_rows, 5]
    const int32_t* records;   // [1 + tiles, 8]
    const int32_t* geometry;  // [slices, (table row, first column of y, width)]
    int64_t stride_y;
    int64_t stride_x;
    int32_t site_rows;
    int32_t slices;
    int32_t in_features;
};

}  // namespace ml

extern "C" {

// dtype       0 bf16, 1 fp16
// bucket      16 or 64: no rank is larger; what a larger one has beyond it is left out
// is_aligned  x, y, their strides, in_features, offsets and widths are multiples of 8 elements
// clusters    how many go over the work; any number gives the same bits
// is_early    programmatic dependent launch: see the kernel
// Returns 0, or an error that ml_cuda_error puts into words.
int ml_cuda_lora(const ml::LoraArgs* args, int dtype, int bucket, int is_aligned, int clusters, int is_early,
                 void* stream);

// What a grid is sized by: clusters that fit the device at once, and columns of a slice that one takes at once.
int ml_cuda_lora_resident(int dtype, int bucket, int is_aligned);
int ml_cuda_lora_columns();

const char* ml_cuda_error(int error);
}
