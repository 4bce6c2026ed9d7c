"""Coverage-guided fuzzing of what reads other people's bytes: `./dev fuzz TARGET`.

reference.py   what is wrong with a batch, by the contract: slow, plain, and knowing no short cuts
delivery.py    target: the bytes of a Delivery -> identity, comparison, validation, weight, record, Kafka message
likeness.py    target: a batch -> comparison with those before it
files.py       targets: files of batches, delimited and as JSON lines
mutator.py     changes a batch field by field; in a Delivery it is sealed again
seeds.py       the first inputs, by the agent's own encoder
corpus/        what is kept: an input for each way through the code that was found

A target takes bytes and raises when the code under test breaks its word. It holds no state between two inputs.
"""
