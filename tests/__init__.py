"""Tests mirror the package. Without a GPU, Triton kernels run in its interpreter and CUDA kernels in an emulator (ops/); tests marked `gpu` need one.

references        what every operator must compute, as short float32 loops; forced_experts: the same for whole models in 16 bit
moe_cases         routings, adapters and layers that tests and benchmarks share
tiny_models, quantized_checkpoints, quantize, adapter_files      files that tests serve: checkpoints and adapters of every kind
engine/models, engine/fake_runner, models/driver                 engines on them, and a runner without a model
server/fake_engine, demo_server, books                           servers, and whether an engine's books agree
ops/emulator, ops/*_driver.cpp, ops/ahead                        CUDA kernels as programs for the CPU, compiled beside other tests
ops/compile_gates, ops/decoder_gates                             what a compiler makes of the Triton kernels: spills, tensor cores, memory
"""
