// What Python finds in the library by its name.
#pragma once

#if defined(_WIN32)
#define QPASS_EXPORT extern "C" __declspec(dllexport)
#else
#define QPASS_EXPORT extern "C" __attribute__((visibility("default")))
#endif
