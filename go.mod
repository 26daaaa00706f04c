module example.com/conduit

go 1.26
