// The parts of the core's check (check.cpp, check_faults.cpp).
#pragma once

namespace faults {
extern thread_local bool exempt;  // allocations of this thread do not fail
}

int check_faults();  // failures
