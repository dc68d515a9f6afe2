"""`make bench-gpu`: whether the kernels are right on a GPU, how fast they are, and what whole steps cost.

    python -m loadtest.gpu.check     every kernel against fp64, poisoned, also inside graphs
    python -m loadtest.gpu.kernels   microseconds of each against its byte floor and against others' kernels
    python -m loadtest.gpu.steps     decode and prefill of an 8B shape; isolation while adapters come and go

Each ends within its --seconds, prints a table last and writes JSON to --out. They need torch, triton and this
checkout, nothing installed: of the project they import `kernels` alone. With --tiny they run on the CPU, Triton in
its interpreter, at tiny shapes: the same code, whose times then mean nothing.
"""
