from pliant.checkpoint.hook import install
install()
