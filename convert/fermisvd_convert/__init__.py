"""The offline program: a dense model in, a FermiSVD checkpoint out."""
