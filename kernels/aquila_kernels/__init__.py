"""Operations for small language models with large vocabularies; knows only torch and Triton."""
