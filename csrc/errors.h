// What a launcher's return code means, for files that know no CUDA header.
#pragma once

extern "C" const char* cuda_error_text(int code);
