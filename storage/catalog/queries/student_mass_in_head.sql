-- question: How much of the student's probability does its stored head cover, and what does the teacher think of it?
-- column run: run id
-- column head_k: ids in the head
-- column num_tokens: positions
-- column student_mass: mean probability the sampling student puts on its head, fraction
-- column teacher_mass: mean probability its own teacher puts on the same ids, fraction; null while unscored
WITH student AS (
    -- From the mass outside the head, which is one number per token and not head_k of them.
    SELECT run, head_k, count(*) AS num_tokens, 1 - avg(exp(outside)) AS mass
    FROM (SELECT run, head_k, unnest(tail_logmass) AS outside FROM trajectory_rows WHERE head_k > 0)
    GROUP BY run, head_k
), teacher AS (
    SELECT run, head_k, avg(exp(logprob)) * head_k AS mass
    FROM (
        SELECT run, head_k, unnest(head_logprobs) AS logprob
        FROM score_rows WHERE head_k > 0 AND origin = 'run'
    )
    GROUP BY run, head_k
)
SELECT run, head_k, num_tokens, student.mass AS student_mass, teacher.mass AS teacher_mass
FROM student LEFT JOIN teacher USING (run, head_k)
ORDER BY run, head_k
