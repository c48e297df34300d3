// The order of additions as a GPU must at least walk it: dependent m16n8k16 instructions of one warp, with no data to
// bring. `operand` is 0; it comes from outside so that nothing is computed ahead.
extern "C" __global__ void chain(int steps, unsigned operand, float* out) {
    float acc[4] = {0, 0, 0, 0};
#pragma unroll 8
    for (int step = 0; step < steps; step++) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(operand));
    }
    out[threadIdx.x] = acc[0] + acc[1] + acc[2] + acc[3];
}
