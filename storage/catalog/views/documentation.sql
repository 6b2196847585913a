-- relation: One row per column of every relation, with its comment.
-- column relation: Relation.
-- column column: Column.
-- column type: DuckDB type.
-- column meaning: Meaning, unit and shape.
SELECT table_name AS relation, column_name AS column, data_type AS type, comment AS meaning
FROM duckdb_columns() WHERE NOT internal AND comment IS NOT NULL ORDER BY table_name, column_index
