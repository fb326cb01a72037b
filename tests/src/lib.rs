//! The harness under the end-to-end tests: devices, load, processes and comparison.
