"A course that is also the program: build, train, tune and talk to a GPT, notebook by notebook."

__version__ = "0.1.0"
