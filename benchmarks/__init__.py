"""What is measured, and how; what was found is in RESULTS.md.

bench_align, bench_moe_lora, bench_marlin, bench_marlin_linear   kernels and layers on a GPU, beside recorded times of peers (peers_*.json)
bench_engine, bench_engine_parts                                 steps of the whole engine; what each part of a layer adds to them
bench_cold, bench_serving, bench_demo                            what users see: adapters that come and go, HTTP, the embedded demo
timing                          how all of them measure and record; shapes: the models they name
moe_inputs, dummy_model, dummy_server, serving_load              what they measure on: layers, models and adapters without files, loads
moe_sweep, moe_parts, profile_marlin, compile_ahead              to tune kernels: tiles, parts of a layer, one launch, compiles without a GPU
soak                            many random requests while adapters come and go; answers are compared
"""
