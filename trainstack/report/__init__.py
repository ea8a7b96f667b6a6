"""A picture of one run, or of several, as one file that opens without a network.

series.py  measurements as curves that can be drawn
facts.py   all that the page says of one run
page.py    the file that is written

page.html, page.css, page.js and curves.js are what a browser gets; uplot/ has uPlot, which draws
the curves, unchanged.
"""
