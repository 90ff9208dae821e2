"""Programs for developers: benchmarks, demo data, services for the tests."""
