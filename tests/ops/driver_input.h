// What a driver of an emulated kernel reads from its standard input.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) std::exit(2);
  return values;
}
