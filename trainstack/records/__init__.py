"""Data files become records, in memory that does not grow with them.

chunks.py   what a reader is asked for, and gives: consecutive records of a file
columns.py  which columns of a record make it one of a format
readers.py  which files can be read; jsonl, json, csv and txt
tables.py   parquet and arrow, of which only some columns are read
"""
