from fermisvd_convert.cli import app

app()
