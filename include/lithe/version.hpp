#pragma once

/// The one place of the version; CMake reads these three lines.
#define LITHE_VERSION_MAJOR 0
#define LITHE_VERSION_MINOR 1
#define LITHE_VERSION_PATCH 0
