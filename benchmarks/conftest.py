def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="benchmarks: the small stand-in cases")
