"""What a pass saves by computing only its causal cones: eight kinds of experiment against four ways to do them.

python -m bench.run cones                                              # every cell of the grid; 15 minutes
python -m bench.cones --model 16x1024 --tokens 256 --cases a b         # some cells with more time
"""
